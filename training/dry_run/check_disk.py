"""Room for a run's checkpoints where they are written, and the right to write there."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_video.errors import UserError
from training.checkpoint_disk import GIGABYTE
from training.checkpoint_folders import step_folders
from training.config import PretrainConfig
from training.dry_run.findings import Findings

CHECK = "disk"
_HOUR = 3600.0


@dataclass(frozen=True)
class DiskNeed:
    """Of one run."""

    folder: Path
    """run.output_dir."""
    checkpoint_bytes: int
    """Of one checkpoint's tensors."""
    count: int
    """Checkpoints there at the fullest moment: those that are kept, and one that is being written."""
    present_bytes: int
    """Of checkpoints that are there already."""
    field: str = "run.output_dir"
    """That names the folder."""

    @property
    def bytes(self) -> int:
        """Further ones."""
        return max(0, self.count * self.checkpoint_bytes - self.present_bytes)

    def values(self) -> dict[str, object]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints": self.count,
            "present_bytes": self.present_bytes,
            "needed_bytes": self.bytes,
        }


def disk_need(config: PretrainConfig, checkpoint_bytes: int, first_step: int, step_seconds: float | None) -> DiskNeed:
    """How much a run will write from `first_step` on, and keep."""
    folder = Path(config.run.output_dir)
    present = sum(_size(path) for path in step_folders(folder / "checkpoints"))
    return DiskNeed(folder, checkpoint_bytes, _count(config, first_step, step_seconds), present)


def check_disk(needs: Sequence[DiskNeed], findings: Findings) -> None:
    """Refuse folders that cannot be written, and file systems without room for all the needs on them together."""
    by_place: dict[int, list[tuple[DiskNeed, Path]]] = {}
    for need in needs:
        with findings.check(CHECK):
            place = _existing(need)
            _try_to_write(place, need)
            by_place.setdefault(place.stat().st_dev, []).append((need, place))
    for members in by_place.values():
        with findings.check(CHECK):
            _refuse_full(members)


def _refuse_full(members: Sequence[tuple[DiskNeed, Path]]) -> None:
    needed, free = sum(need.bytes for need, _ in members), shutil.disk_usage(members[0][1]).free
    if needed > free:
        listed = "; ".join(
            f"{need.folder}: {need.count} checkpoints of {need.checkpoint_bytes / GIGABYTE:,.3f} GB"
            + (f", {need.present_bytes / GIGABYTE:,.3f} GB there" if need.present_bytes else "")
            for need, _ in members
        )
        raise UserError(
            f"{needed / GIGABYTE:,.3f} GB needed, {free / GIGABYTE:,.3f} GB free ({listed}); make room, keep fewer "
            f"of them, or write elsewhere ({members[0][0].field})"
        )


def _count(config: PretrainConfig, first_step: int, step_seconds: float | None) -> int:
    training, settings = config.training, config.checkpoint
    saves = math.ceil(max(0, training.steps - first_step) / training.save_every)
    saves += first_step == 0 and training.save_initial
    if training.keep_checkpoints == 0 or saves == 0:
        return saves
    kept = min(saves, training.keep_checkpoints)
    # The oldest goes when the newest is complete.
    count = kept + (saves > kept)
    if settings.keep_every:
        count += training.steps // settings.keep_every
    if settings.keep_one_per_hours and step_seconds is not None:
        hours = step_seconds * (training.steps - first_step) / _HOUR
        count += int(min(hours, settings.delete_after_hours or hours) / settings.keep_one_per_hours)
    return min(count, saves)


def _size(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.is_file())


def _existing(need: DiskNeed) -> Path:
    """The nearest folder above that is there."""
    for place in (need.folder, *need.folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{need.field}={need.folder}: {place} is a file; name another folder")
            return place
    raise UserError(f"{need.field}={need.folder}: no part of this path is there")


def _try_to_write(place: Path, need: DiskNeed) -> None:
    try:
        # A quota, or a file system that is read-only, shows with the first byte; the file has no name and leaves none.
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise UserError(
            f"{need.field}={need.folder} cannot be written ({place}: {error.strerror}); name another folder, "
            "or mend its permissions"
        ) from None
