"""What asks a job to save and leave, so that a scheduler can start it again: SIGTERM, SIGUSR1, the end of its time."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

REQUEUE_EXIT_CODE = 143
"""Exit code of a run that was asked to stop, saved, and is to be started again with the same command (128 + SIGTERM,
whatever asked)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# In the order of the flags that all ranks add up in a step; the first one raised is the reason given.
STOP_REASONS = ("signal", "wall time", "checkpoint failed")


class StopSignal:
    """Remembers that a stop was asked for; the training loop asks it in every step.

    Args:
        deadline: Unix time at which the job is killed, or None.
        reserve_seconds: what is kept free for the last save as long as none was measured.
    """

    def __init__(self, deadline: float | None = None, reserve_seconds: float = 0.0) -> None:
        self.requested = False
        self.save_failed = False
        self.deadline, self._reserve = deadline, reserve_seconds
        self._slowest_save = 0.0
        self._slowest_step, self._looks, self._last_look = 0.0, 0, time.time()

    def __enter__(self) -> StopSignal:
        """Start listening. A second signal changes nothing (torchrun sends it twice)."""
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        self._last_look = time.time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def saw_save(self, seconds: float) -> None:
        """A checkpoint took so long from its start until it was complete. May be called from its thread."""
        self._slowest_save = max(self._slowest_save, seconds)

    def between_steps(self) -> None:
        """The time until now, of a save, belongs to no step."""
        self._last_look = time.time()

    def flags(self) -> list[bool]:
        """What this rank knows, in the order of STOP_REASONS; call it once a step."""
        now = time.time()
        # The first step of a life compiles and warms up; no later one is like it.
        if self._looks > 1:
            self._slowest_step = max(self._slowest_step, now - self._last_look)
        self._looks, self._last_look = self._looks + 1, now
        late = self.deadline is not None and now + self.seconds_needed >= self.deadline
        return [self.requested, late, self.save_failed]

    @property
    def seconds_needed(self) -> float:
        """Time for two more steps and a save: twice the slowest save seen, and never less than the reserve."""
        # Two steps: this one may end just before the deadline is looked at again.
        return 2 * self._slowest_step + max(2 * self._slowest_save, self._reserve)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # No work in a signal handler: the loop saves at the end of the step.
        self.requested = True
