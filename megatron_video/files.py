"""Small helpers for files, free of torch: stages that need no more of the shards start in a third of the time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder to write to; it becomes `path` if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, in the same folder; content and name are on the disk when this returns.

    So of two files that are published one after the other, a power loss never leaves the second alone.
    """
    sync(temporary)
    rename_durably(temporary, path)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within a folder, or replace a file, so that a power loss does not undo it."""
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole; see `appearing`."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)
