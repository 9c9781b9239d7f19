"""SIGTERM and SIGUSR1 ask the job to save and leave, so that a scheduler can start it again."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

REQUEUE_EXIT_CODE = 143
"""Exit code of a run that was asked to stop, saved, and is to be started again with the same command (128 + SIGTERM,
for both signals)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that a stop was asked for; the training loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        """Start listening. A second signal changes nothing (torchrun sends it twice)."""
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # No work in a signal handler: the loop saves at the end of the step.
        self.requested = True
