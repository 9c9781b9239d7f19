"""SIGTERM and SIGUSR1 ask the job to save and leave, so that a scheduler can start it again."""

from __future__ import annotations

import signal
from types import FrameType

REQUEUE_EXIT_CODE = 143
"""Exit code of a run that was asked to stop, saved, and is to be started again with the same command (128 + SIGTERM,
for both signals)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that a stop was asked for; the training loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Start listening. A second signal changes nothing (torchrun sends it twice)."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
