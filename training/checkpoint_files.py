"""The files of a checkpoint: written so that they survive a power failure, with sizes and checksums to know them by.

`train_state.json` is written last. It lists every other file with its size and its CRC-32 (of the bytes as they were
handed to the file system, so that what changed on the way to the disk shows too), and holds a digest of itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from isal import isal_zlib

from megatron_video.files import rename_durably

# Written once here; readers and writers go by the same names.
STATE_FILE, CONFIG_FILE, LATEST_FILE = "train_state.json", "config.yaml", "latest"
WRITING_SUFFIX, REPLACED_SUFFIX, DELETING_SUFFIX = ".writing", ".replaced", ".deleting"
# In train_state.json: Unix time at which the checkpoint was complete.
WRITTEN = "written"
_BLOCK = 1 << 24


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file without reading it."""

    size: int
    crc32: int | None
    """None in checkpoints of versions that wrote no checksums."""


class ChecksummedStream(io.RawIOBase):
    """A file that is only written, from front to end, and knows the checksum of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._written, self._crc32 = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Add bytes."""
        with memoryview(data) as view, view.cast("B") as flat:
            # Both let other threads run: training goes on meanwhile.
            self._crc32 = isal_zlib.crc32(flat, self._crc32)
            try:
                self._file.write(flat)
            except OSError as error:
                # torch.save puts an error of its own in its place.
                self.error = self.error or error
                raise
            self._written += len(flat)
            return len(flat)

    def writable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self._written

    @property
    def stored(self) -> StoredFile:
        """Size and checksum of what was written."""
        return StoredFile(self._written, self._crc32)


@contextmanager
def durable_file(path: Path) -> Iterator[ChecksummedStream]:
    """A new file; when the block ends without an error, its bytes are on the disk.

    Raises:
        OSError: it could not be written; names the file.
    """
    stream = None
    try:
        with open(path, "wb") as file:
            stream = ChecksummedStream(file)
            yield stream
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        cause = stream.error if stream and stream.error else error
        if not isinstance(cause, OSError):
            raise
        # A write that fails knows no name.
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def write_durably(path: Path, text: str) -> None:
    """Write a small file under a temporary name, and rename it."""
    temporary = path.with_name(path.name + WRITING_SUFFIX)
    with durable_file(temporary) as stream:
        stream.write(text.encode())
    rename_durably(temporary, path)


def stored_file(path: Path) -> StoredFile:
    """Size and checksum of a file, by reading all of it."""
    crc32 = size = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            crc32, size = isal_zlib.crc32(block, crc32), size + len(block)
    return StoredFile(size, crc32)


def write_state(folder: Path, values: dict[str, Any], files: dict[str, StoredFile]) -> None:
    """Write train_state.json with `values` and the list of all other files."""
    content = values | {
        "files": {name: file.size for name, file in sorted(files.items())},
        "checksums": {name: f"crc32:{file.crc32:08x}" for name, file in sorted(files.items())},
    }
    with durable_file(folder / STATE_FILE) as stream:
        stream.write(json.dumps(content | {"digest": _digest(content)}, indent=1).encode())


def read_state_values(folder: Path) -> tuple[dict[str, Any], dict[str, StoredFile]]:
    """What train_state.json says: values, and the files.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        # Older checkpoints have neither digest nor checksums.
        if content.pop("digest", None) not in (None, _digest(content)):
            raise ValueError("its digest differs")
        sizes, sums = content.pop("files"), content.pop("checksums", {})
        files = {name: StoredFile(size, _parse_checksum(sums.get(name))) for name, size in sizes.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {STATE_FILE} is damaged ({error})") from None
    return content, files


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: an unfinished one, files that lack or differ in size."""
    # Cheap checks only, no large file is read: this runs at every start on folders of many terabytes.
    if folder.suffix in (WRITING_SUFFIX, REPLACED_SUFFIX, DELETING_SUFFIX):
        return f"its writing was interrupted, or its deletion ({folder.suffix}); delete it"
    if not (folder / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}, so it was not written to its end or is no checkpoint of this program"
    try:
        _, files = read_state_values(folder)
    except ValueError as error:
        return str(error)
    return find_lack(folder, files)


def find_lack(folder: Path, files: dict[str, StoredFile]) -> str | None:
    """The first of `files` that is not in the folder or has another size, or None."""
    for name, file in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != file.size:
            return f"{name} has {found} bytes, written were {file.size}"
    return None


def find_flip(folder: Path, names: Iterable[str]) -> str | None:
    """The first of the named files whose bytes are not the ones that were written, or None."""
    _, files = read_state_values(folder)
    for name in names:
        stored = files[name]
        if stored.crc32 is None:
            continue
        try:
            found = stored_file(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != stored:
            return f"{name} has checksum {found.crc32:08x}, written was {stored.crc32:08x}: its bytes changed since"
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse_checksum(text: str | None) -> int | None:
    if text is None:
        return None
    kind, _, value = text.partition(":")
    if kind != "crc32":
        raise ValueError(f"unknown checksum {text}")
    return int(value, 16)
