"""Where this rank is in a step, and for how long: heartbeat of the watchdog, clock of the straggler report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# In the order in which a step passes them: of two ranks in one step, the one in the earlier part is behind.
PHASES = ("start", "data", "forward_backward", "reduce", "agree", "update", "report", "checkpoint", "validation")
STEP_PHASES = ("data", "forward_backward", "reduce", "agree", "update", "report")
# Their work is queued on the device, so that the host's clock says little about it.
DEVICE_PHASES = ("forward_backward", "reduce", "agree", "update")


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of progress."""

    phase: str
    """One of PHASES."""
    step: int
    """Optimizer steps done when it began."""
    since: float
    """time.monotonic() of its beginning."""


class Phases:
    """Told by the loop what it does; costs a microsecond a phase and never waits for the device.

    Args:
        device: where the model computes; on CUDA the parts of DEVICE_PHASES are timed by events.
    """

    def __init__(self, device: torch.device) -> None:
        self.heartbeat = Heartbeat("start", 0, time.monotonic())
        self.is_first_step = True
        self.listeners: list[Callable[[str], None]] = []
        """Called with every phase that begins, from the training thread."""
        self.times_device = False
        """Whether device phases are timed; somebody must then call take_seconds now and then."""
        self._on_device = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        # Ends and beginnings of device phases; read when they are long past.
        self._marks: list[tuple[str, torch.cuda.Event]] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        """The loop begins `phase`; without `step` it is still in the same one."""
        before, now = self.heartbeat, time.monotonic()
        # The loop reports after every step.
        self.is_first_step &= phase != "report"
        # One assignment: the watchdog's thread never sees half of it.
        self.heartbeat = Heartbeat(phase, before.step if step is None else step, now)
        if not self._on_device or before.phase not in DEVICE_PHASES:
            self._seconds[before.phase] += now - before.since
        self._tell(phase)
        if self._on_device and self.times_device and (phase in DEVICE_PHASES or before.phase in DEVICE_PHASES):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))

    def _tell(self, phase: str) -> None:
        for listener in self.listeners:
            listener(phase)

    def entering(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which is called at the beginning of `phase`."""

        def enter_and_call(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            return function(*args, **kwargs)

        return enter_and_call

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each phase since the last call, without what the device has not done yet: that comes next time."""
        done = sum(1 for _ in itertools.takewhile(lambda mark: mark[1].query(), self._marks))
        for (phase, start), (_, end) in itertools.pairwise(self._marks[:done]):
            if phase in DEVICE_PHASES:
                self._seconds[phase] += start.elapsed_time(end) / 1000
        # The last one read is the beginning of the next.
        self._marks = self._marks[max(done - 1, 0) :]
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken
