"""Which of a run's checkpoints are deleted: by count, by step and by age."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.checkpoint_config import CheckpointConfig

HOUR = 3600.0


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is there."""

    folder: Path
    step: int
    written: float
    """Unix time at which it was complete."""


def deletable(stored: Sequence[Stored], keep: int, settings: CheckpointConfig, now: float) -> list[Stored]:
    """Those that no rule keeps, oldest first.

    Args:
        stored: all checkpoints of a run.
        keep: newest that are kept; 0: all. Step 0 is always kept, and not counted.
        settings: the rules for those beyond `keep`.
        now: Unix time.
    """
    counted = sorted((item for item in stored if item.step), key=lambda item: item.step)
    if keep == 0:
        return []
    beyond = [item for item in counted[:-keep] if not settings.keep_every or item.step % settings.keep_every]
    spared = _one_per_interval(beyond, settings, now)
    return [item for item in beyond if item not in spared]


def _one_per_interval(stored: Sequence[Stored], settings: CheckpointConfig, now: float) -> list[Stored]:
    """The first of every interval of the clock, so that which one it is never changes."""
    if not settings.keep_one_per_hours:
        return []
    first: dict[int, Stored] = {}
    for item in stored:
        first.setdefault(int(item.written // (settings.keep_one_per_hours * HOUR)), item)
    limit = settings.delete_after_hours
    return [item for item in first.values() if limit is None or now - item.written <= limit * HOUR]
