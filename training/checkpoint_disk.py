"""What can be wrong with the disk that a checkpoint is written to, said in so many words."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from training.checkpoint_files import StoredFile, find_lack

GIGABYTE = 1e9
# Room for metadata and configuration beside the tensors.
_SPARE_BYTES = 1 << 20
# Network file systems may show one node the files of another this late.
VISIBLE_SECONDS = 90.0


def make_folder(writing: Path, need: int) -> str | None:
    """A new, empty folder with room for `need` bytes; else why not."""
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        free = shutil.disk_usage(writing).free
        if free < need + _SPARE_BYTES:
            shutil.rmtree(writing, ignore_errors=True)
            return f"no room in {writing.parent}: {_gigabytes(need)} needed, {_gigabytes(free)} free"
        # A quota, or a file system that is read-only, shows with the first byte.
        probe = writing / "probe"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        return describe(error, writing, need)
    return None


def wait_until_visible(writing: Path, files: dict[str, StoredFile], seconds: float = VISIBLE_SECONDS) -> None:
    """Until this node sees the files of the other nodes as they wrote them.

    Raises:
        RuntimeError: it does not.
    """
    deadline = time.monotonic() + seconds
    while lack := find_lack(writing, files):
        if time.monotonic() >= deadline:
            raise RuntimeError(
                f"rank 0 does not see what other ranks wrote ({writing}: {lack}); run.output_dir must be on a file "
                "system that all nodes share"
            )
        time.sleep(0.1)


def describe(error: Exception, writing: Path, need: int) -> str:
    """An error of writing with the file, the room and the need (bytes; 0: not said)."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    place = next((folder for folder in (writing, *writing.parents) if folder.exists()), Path("/"))
    needed = f", {_gigabytes(need)} needed by this rank" if need else ""
    return (
        f"cannot write {error.filename or writing}: {error.strerror}; "
        f"{_gigabytes(shutil.disk_usage(place).free)} free there{needed}"
    )


def _gigabytes(count: int) -> str:
    return f"{count / GIGABYTE:.3f} GB"
