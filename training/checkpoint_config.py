"""Configuration of checkpoints: how they are written, checked, and how many are kept."""

from __future__ import annotations

from typing import Literal

from megatron_video.config_io import config_dataclass


@config_dataclass
class CheckpointConfig:
    """Writing, checking and keeping of checkpoints; training.save_every and training.keep_checkpoints say when and how
    many."""

    asynchronous: bool = True
    """Train on while the files are written, from a copy in host memory, kept for the whole run: as large as what this
    rank writes, on CUDA up to twice that, as pinned memory comes in powers of two. false: training waits until the
    checkpoint is complete, and no copy is kept."""
    files_per_rank: int = 2
    """Files that each rank writes at the same time."""
    max_wait_seconds: float = 1800.0
    """Longest time to wait for a save under way, when the next one is due or the run ends; then it counts as failed."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a save that failed (disk full, no permission) does: end the run with that error, or train on and try again
    at the next save. Older checkpoints stay as they are. The last save of a run may never fail."""
    verify: Literal["sizes", "checksums"] = "sizes"
    """What is compared before a checkpoint is continued from: the sizes of its files, or also their checksums, for
    which all of it is read once more, shared over the ranks."""
    on_damage: Literal["refuse", "older"] = "refuse"
    """What happens if the newest checkpoint lost a file or has a wrong one: refuse to start, or continue from the
    newest whole one with a warning. Writing that was interrupted is no damage: it was never published."""
    keep_every: int = 0
    """Never delete checkpoints whose step is a multiple of this; 0: none is spared so."""
    keep_one_per_hours: float = 0.0
    """Beyond the newest training.keep_checkpoints, keep one for every so many hours of the run (24: one a day); 0: keep
    none of them."""
    delete_after_hours: float | None = None
    """Age at which those kept by keep_one_per_hours are deleted; null: never."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: naming the field and the value.
        """
        if self.files_per_rank < 1:
            raise ValueError(f"files_per_rank={self.files_per_rank} must be at least 1")
        if self.max_wait_seconds <= 0:
            raise ValueError(f"max_wait_seconds={self.max_wait_seconds} must be above 0")
        for name in ("keep_every", "keep_one_per_hours"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.delete_after_hours is not None and self.delete_after_hours <= 0:
            raise ValueError(f"delete_after_hours={self.delete_after_hours} must be above 0, or null")
        if self.delete_after_hours is not None and not self.keep_one_per_hours:
            raise ValueError(
                f"delete_after_hours={self.delete_after_hours} deletes what keep_one_per_hours keeps, which is 0"
            )
