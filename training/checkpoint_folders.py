"""The checkpoints of a run: `<run>/checkpoints/step_00000100/`, and `latest`, which names the newest complete one.

A checkpoint is written under a name ending in `.writing`, and gets its own name when all of it is on the disk. What a
killed job leaves is put right by the next one: `recover`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_video.errors import UserError
from megatron_video.files import rename_durably, sync
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_files import (
    DELETING_SUFFIX,
    LATEST_FILE,
    REPLACED_SUFFIX,
    STATE_FILE,
    WRITING_SUFFIX,
    WRITTEN,
    find_fault,
    find_flip,
    read_state_values,
    write_durably,
)
from training.checkpoint_retention import Stored, deletable

_STEP_FOLDER = re.compile(r"step_(\d{8})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damaged:
    """The newest checkpoint is not as it was written."""

    folder: Path
    fault: str

    def __str__(self) -> str:
        """What is wrong, and what can be done."""
        return (
            f"{self.folder} is damaged: {self.fault}. Restore it, or move it away to use the next older checkpoint; "
            "checkpoint.on_damage=older makes a run do so by itself"
        )


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run or checkpoints folder.

    Raises:
        UserError: nothing there, a half-written or damaged checkpoint, or a folder that is no checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run folder or one of its checkpoints/step_... folders")
    if (path / STATE_FILE).exists() or path.name.startswith("step_"):
        # A path that names one checkpoint is never replaced by another.
        fault = find_fault(path)
        if fault:
            raise UserError(f"{path} is not a complete checkpoint: {fault}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = newest_checkpoint(root)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint (looked for {root}/step_00000000 and the like)")
    return newest


def newest_checkpoint(
    checkpoints_dir: Path, up_to_step: int | None = None, older_if_damaged: bool = False
) -> Path | None:
    """The newest checkpoint of a folder, or None; what was not written to its end is reported and passed over.

    Args:
        checkpoints_dir: folder of the checkpoints; need not be there.
        up_to_step: only those of at most so many steps.
        older_if_damaged: pass over damaged ones too, with a warning.

    Raises:
        UserError: the newest was complete and is not any more.
    """
    for folder in reversed(step_folders(checkpoints_dir)):
        if up_to_step is not None and _step(folder) > up_to_step:
            continue
        fault = find_fault(folder)
        if fault is None:
            return folder
        if not older_if_damaged and _was_complete(folder):
            raise UserError(str(Damaged(folder, fault)))
        _log.warning("ignoring %s: %s", folder, fault)
    return None


def agree_on_newest(
    checkpoints_dir: Path, settings: CheckpointConfig | None = None, up_to_step: int | None = None
) -> Path | None:
    """The checkpoint that all ranks continue from, or None; what a killed job left behind is put right first.

    Rank 0 looks: file systems show new files to some nodes late. Checksums are compared by all ranks, each for its
    share of the files. `up_to_step`: only those of at most so many steps.

    Raises:
        UserError: on all ranks; the newest checkpoint is damaged, and settings.on_damage refuses that.
    """
    settings = settings or CheckpointConfig()
    if dist.get_rank() == 0:
        recover(checkpoints_dir)
    limit = up_to_step
    while True:
        found, refusal = _from_rank_0(lambda limit=limit: _choose(checkpoints_dir, settings, limit))
        if refusal:
            raise UserError(refusal)
        flip = _flip_found_by_any(found) if found is not None and settings.verify == "checksums" else None
        if flip is None:
            return found
        if settings.on_damage == "refuse":
            raise UserError(str(Damaged(found, flip)))
        if dist.get_rank() == 0:
            _log.warning("ignoring %s: %s", found, flip)
        limit = _step(found) - 1


def recover(checkpoints_dir: Path) -> None:
    """Put right what a killed job left: half-written folders go, a checkpoint that was about to be replaced comes back.

    No job may be writing there.
    """
    (checkpoints_dir / (LATEST_FILE + WRITING_SUFFIX)).unlink(missing_ok=True)
    restore_replaced(checkpoints_dir)
    for suffix in (REPLACED_SUFFIX, WRITING_SUFFIX, DELETING_SUFFIX):
        for folder in sorted(checkpoints_dir.glob(f"step_*{suffix}")):
            shutil.rmtree(folder)


def restore_replaced(checkpoints_dir: Path) -> None:
    """Give checkpoints their names back that were about to be replaced when the job was killed."""
    for folder in sorted(checkpoints_dir.glob(f"step_*{REPLACED_SUFFIX}")):
        target = folder.with_suffix("")
        if not target.exists():
            rename_durably(folder, target)


def publish(writing: Path, target: Path) -> None:
    """Give a complete folder its name, and move `latest` to it. All its files are on the disk already."""
    replace_folder(writing, target)
    write_durably(target.parent / LATEST_FILE, target.name + "\n")


def replace_folder(writing: Path, target: Path) -> None:
    """Give a complete folder the name `target`; one that has it is there until then, and comes back after a kill.

    All files of `writing` are on the disk already.
    """
    sync(writing)
    replaced = target.with_name(target.name + REPLACED_SUFFIX)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():  # this step was saved before, and the run went back behind it
        os.replace(target, replaced)
    # From here on the checkpoint counts as complete, whether `latest` moves or not.
    rename_durably(writing, target)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(checkpoints_dir: Path, keep: int, settings: CheckpointConfig) -> list[Path]:
    """Delete the checkpoints that no rule keeps.

    Returns:
        Those that are gone.
    """
    stored = [Stored(folder, _step(folder), _written(folder)) for folder in step_folders(checkpoints_dir)]
    gone = []
    for item in deletable(stored, keep, settings, time.time()):
        _delete(item.folder)
        gone.append(item.folder)
    return gone


def discard_newer(checkpoints_dir: Path, step: int) -> list[Path]:
    """Delete the checkpoints of more than `step` steps, and let `latest` name that of `step`: the run went back.

    Returns:
        Those that are gone.
    """
    write_durably(checkpoints_dir / LATEST_FILE, step_folder(checkpoints_dir.parent, step).name + "\n")
    newer = [folder for folder in step_folders(checkpoints_dir) if _step(folder) > step]
    for folder in newer:
        _delete(folder)
    return newer


def _delete(folder: Path) -> None:
    # Renamed first: a deletion that is interrupted leaves nothing that looks like a checkpoint.
    doomed = folder.with_name(folder.name + DELETING_SUFFIX)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _choose(checkpoints_dir: Path, settings: CheckpointConfig, limit: int | None) -> tuple[Path | None, str | None]:
    try:
        return newest_checkpoint(checkpoints_dir, limit, settings.on_damage == "older"), None
    except UserError as refusal:
        return None, str(refusal)


def _from_rank_0(look: Any) -> Any:
    found = [look() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _flip_found_by_any(folder: Path) -> str | None:
    names = sorted(read_state_values(folder)[1])
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_flip(folder, names[dist.get_rank() :: len(found)]))
    return next((flip for flip in found if flip), None)


def step_folders(checkpoints_dir: Path) -> list[Path]:
    """Those of exactly our names, in the order of their steps."""
    if not checkpoints_dir.is_dir():
        return []
    return sorted(path for path in checkpoints_dir.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir())


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _was_complete(folder: Path) -> bool:
    """Whether it once was a checkpoint: publishing renames whole folders, so one of them that lacks a part lost it."""
    return (folder / STATE_FILE).exists() or (folder / ".metadata").exists()


def _written(folder: Path) -> float:
    try:
        values, _ = read_state_values(folder)
        return float(values[WRITTEN])
    except (ValueError, KeyError, OSError):  # older checkpoints do not say
        return folder.stat().st_mtime
