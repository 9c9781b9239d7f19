"""Small helpers for files, free of torch: stages that need no more of the shards start in a third of the time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder to write to; it becomes `path` if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)
