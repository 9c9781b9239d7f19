"""A tar that is written front to back and hashed on the way, so that nothing is read again for its checksum."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_video.files import file_sha256

CHECKSUM = "xxh3_128"
"""In a shard's record. Finds damage as sha256 does, at 30 instead of 2 GB/s; it is no proof against forgery."""
_READ_BYTES = 1 << 20


class ShardTar:
    """An uncompressed USTAR file, byte for byte what `tarfile` writes of members that have a name and a size only."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = xxhash.xxh3_128()
        self.size = 0
        """Bytes written."""

    def append(self, name: str, content: bytes) -> int:
        """Add a member; the position of its first byte in the file."""
        # Time, user and host stay out: they must not change the bytes.
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> str:
        """Write the end of the tar; xxh3_128 of the file, hex. `close` is still due."""
        ending = 2 * tarfile.BLOCKSIZE
        self._write(bytes(ending + -(self.size + ending) % tarfile.RECORDSIZE))
        self._file.flush()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file, finished or not."""
        # Raises too where the disk is full: what is buffered is written here.
        self._file.close()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)


def is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a shard's file has the checksum of its record; records of older shards have a sha256."""
    if CHECKSUM not in record:
        return file_sha256(path) == str(record["sha256"])
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == str(record[CHECKSUM])
