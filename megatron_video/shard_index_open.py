"""Opening the mapped index of a folder of shards, and knowing whether the one that is there is still true."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import tempfile
import time
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.files import appearing, file_sha256
from megatron_video.shard_index import MAP_FILE, MappedIndex
from megatron_video.shard_index_build import FORMAT, SOURCES, IndexBuilder
from megatron_video.shard_schema import INFO_FILE, read_info

_LONGEST_WAIT_SECONDS = 1800
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)


def open_index(folder: Path) -> MappedIndex:
    """The mapped index of a finished folder; made first where there is none, or none that is true.

    Of several ranks that start together, rank 0 makes it and the others wait.

    Raises:
        UserError: no finished shards there, or an index that is damaged, has a key twice or does not fit its buckets.
    """
    if not (folder / INFO_FILE).is_file():
        read_info(folder)
    for path in _candidates(folder):
        found = _still_true(folder, path)
        if found is not None:
            return found
    if int(os.environ.get("RANK", "0")) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = _wait_for_rank_0(folder)
        if found is not None:
            return found
    return build_index(folder)


def build_index(folder: Path) -> MappedIndex:
    """Make the mapped index of a finished folder anew: beside the shards, or in the user's cache where that fails.

    Raises:
        UserError: the index is damaged, has a key twice or does not fit its buckets.
    """
    for path in _candidates(folder):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with appearing(path) as temporary:
                IndexBuilder(folder, temporary).build()
                # Equal times say at the next start that nothing changed, without reading gigabytes.
                os.utime(temporary, ns=(_newest(folder), _newest(folder)))
            return MappedIndex(path)
        except OSError as error:
            # A full disk is an error; a folder that others own is not.
            if error.errno not in _CANNOT_WRITE:
                raise
    places = " nor ".join(str(path) for path in _candidates(folder))
    raise UserError(f"{folder}: its mapped index can be written neither to {places}; make one of them writable")


def is_true(index: MappedIndex, folder: Path) -> bool:
    """Whether a mapped index is, byte for byte, what index.parquet gives; makes it once more to know."""
    beside = index.path.parent if os.access(index.path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside) as scratch:
        again = Path(scratch) / MAP_FILE
        IndexBuilder(folder, again).build()
        return filecmp.cmp(again, index.path, shallow=False)


def _candidates(folder: Path) -> tuple[Path, Path]:
    """Beside the shards, and in the user's cache for folders that are read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=16).hexdigest()
    return folder / MAP_FILE, cache / "megatron-video" / f"{name}.{MAP_FILE}"


def _still_true(folder: Path, path: Path) -> MappedIndex | None:
    """The mapped index at `path` if it was made of what the folder holds now."""
    if not path.is_file():
        return None
    try:
        found = MappedIndex(path)
    except (UserError, ValueError, KeyError, TypeError):
        return None
    sources = found.header["sources"]
    if found.header["format"] != FORMAT or any((folder / n).stat().st_size != sources[n]["bytes"] for n in SOURCES):
        return None
    if path.stat().st_mtime_ns == _newest(folder):
        return found
    # Copied, or touched: the content decides.
    if any(file_sha256(folder / name) != sources[name]["sha256"] for name in SOURCES):
        return None
    if os.access(path, os.W_OK):
        os.utime(path, ns=(_newest(folder), _newest(folder)))
    return found


def _newest(folder: Path) -> int:
    return max((folder / name).stat().st_mtime_ns for name in SOURCES)


def _wait_for_rank_0(folder: Path) -> MappedIndex | None:
    end = time.monotonic() + _LONGEST_WAIT_SECONDS
    while time.monotonic() < end:
        found = _still_true(folder, _candidates(folder)[0])
        # Where rank 0 cannot write, every host has a cache of its own.
        if found is not None or not os.access(folder, os.W_OK):
            return found
        time.sleep(0.5)
    return None
