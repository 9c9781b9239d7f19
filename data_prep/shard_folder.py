"""A folder of shards that one run writes: its lock, the mark of what belongs there, and what a kill left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.disk import disk_errors
from data_prep.lock import share_lock
from data_prep.workers import Shard
from megatron_video.errors import UserError
from megatron_video.shard_schema import INFO_FILE, PARTS_FOLDER, write_atomically

LOCK_FILE = ".lock"
PLAN_FILE = "plan"


@contextmanager
def claimed(folder: Path, fingerprint: str, share: Shard | None = None) -> Iterator[None]:
    """Hold a folder of shards while it is written.

    Args:
        folder: made if it is not there.
        fingerprint: of what will be in it; a folder with another one is refused.
        share: hold only this part of the work; others may hold theirs.

    Raises:
        UserError: another run holds it, it holds something else, or the disk is full (then what is finished stays).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), share_lock(folder / LOCK_FILE, folder, share):
        _claim(folder, fingerprint)
        # Half-written files can be told from those that others are writing only by who holds the whole.
        if share is None:
            _clear(folder)
        try:
            yield
        finally:
            if share is None:
                _clear(folder)


def _claim(folder: Path, fingerprint: str) -> None:
    """Mark the folder as this plan's, or see that it is."""
    mark = folder / PARTS_FOLDER / PLAN_FILE
    if mark.is_file():
        if mark.read_text() != fingerprint:
            raise UserError(
                f"--out {folder} holds shards of another manifest, other encoders or other settings; "
                "name a new folder or remove this one"
            )
    elif any(folder.glob("*.tar")) or (folder / INFO_FILE).exists():
        raise UserError(f"--out {folder} holds files that this command did not write; name a new folder")
    else:
        mark.parent.mkdir(exist_ok=True)
        write_atomically(mark, fingerprint.encode())


def _clear(folder: Path) -> None:
    """Remove what a killed process left half written."""
    # Under the lock of the whole nobody else can be writing them.
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(f"{PARTS_FOLDER}/.*.tmp")):
        leftover.unlink(missing_ok=True)
