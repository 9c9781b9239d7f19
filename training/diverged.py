"""The error of a run that a restart alone does not mend: its numbers went wrong."""

from __future__ import annotations

DIVERGED_EXIT_CODE = 3
"""Exit code of a run whose loss or gradient stayed out of range; the same command would most likely end alike."""


class DivergedError(RuntimeError):
    """Raised on all ranks at the same step; the message says what happened and what can be done."""
