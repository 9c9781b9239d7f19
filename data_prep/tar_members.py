"""Videos and images inside tars (webdataset's form): taken out once, into a folder where names are content hashes.

They are not read in place: a gzipped tar cannot be, and every reader of later stages (libav, Pillow, NVDEC) then sees
an ordinary file. It costs the bytes of the media on disk a second time; equal members take their place only once, and
the folder can go when the shards are made. A tar that was taken out completely has a journal and is not read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from data_prep.listing import MEDIA_SUFFIXES, SIDECAR_SUFFIXES, Entry, described, printable
from megatron_video.errors import UserError
from megatron_video.files import write_atomically

HASH_BYTES = 12
_SIDECAR_LIMIT = 1 << 20
_BLOCK = 1 << 20


def entries_of_tar(tar: Path, folder: Path) -> list[Entry]:
    """Media of a tar, in its order, each taken out to `folder`; captions from members NAME.txt or NAME.json.

    A tar that is damaged gives what stands before the damage, and an entry with the fault.

    Raises:
        UserError: `folder` cannot be written.
    """
    stat = tar.stat()
    name = hashlib.blake2b(f"{tar} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=HASH_BYTES).hexdigest()
    journal = folder / "tars" / f"{name}.jsonl"
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with _locked(journal.with_suffix(".lock")):
            known = _read_journal(journal)
            if known is not None:
                return known
            entries = _take_out(tar, folder, journal.with_suffix(".tmp"))
            lines = (json.dumps(asdict(entry)) for entry in entries)
            write_atomically(journal, "\n".join(lines).encode())
            return entries
    except OSError as error:
        raise UserError(f"--extract-to {folder}: cannot take {tar} out to it: {error.strerror or error}") from None


def content_hash(path: str | Path) -> str:
    """BLAKE2b-96 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return _copy_hashed(file, None)


def _take_out(tar: Path, folder: Path, temporary: Path) -> list[Entry]:
    media: list[tuple[str, Entry]] = []
    sidecars: dict[str, bytes] = {}
    fault = None
    try:
        for name, size, content in _members(tar):
            if name.lower().endswith(MEDIA_SUFFIXES):
                path = _store(content, folder, temporary, Path(name).suffix.lower())
                media.append((name, Entry(str(path), None, None, origin=f"{tar}::{printable(name)}")))
            elif name.lower().endswith(SIDECAR_SUFFIXES) and size <= _SIDECAR_LIMIT:
                sidecars[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        fault = f"unreadable: {tar}: damaged after {len(media)} media: {error}"
    finally:
        temporary.unlink(missing_ok=True)
    if not media and fault is None:
        fault = f"no media: {tar}: no videos or images in this tar"
    by_key = _sidecars_by_key(sidecars)
    entries = [_with_sidecars(name, entry, by_key, sidecars) for name, entry in media]
    return entries if fault is None else [*entries, Entry(str(tar), None, None, origin=str(tar), fault=fault)]


def _members(tar: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size in bytes and content of each file, in one pass; a content is to be read before the next."""
    with tarfile.open(tar, "r|*") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, member.size, content
            # tarfile keeps every header; a tar may have millions.
            archive.members = []  # type: ignore[attr-defined]


def _store(content: IO[bytes], folder: Path, temporary: Path, suffix: str) -> Path:
    with open(temporary, "wb") as file:
        digest = _copy_hashed(content, file)
    # Two levels: file systems dislike folders with millions of files.
    path = (folder / digest[:2] / f"{digest}{suffix}").absolute()
    path.parent.mkdir(exist_ok=True)
    os.replace(temporary, path)
    return path


def _copy_hashed(source: IO[bytes], target: IO[bytes] | None) -> str:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


def _with_sidecars(name: str, entry: Entry, by_key: dict[str, list[str]], sidecars: dict[str, bytes]) -> Entry:
    # The exact stem first: a.1.mp4 belongs to a.1.txt even if webdataset takes both for sample "a".
    found = next((by_key[key] for key in _keys(name) if key in by_key), [])
    return described(entry, {printable(sidecar): sidecars[sidecar] for sidecar in found})


def _sidecars_by_key(names: Iterable[str]) -> dict[str, list[str]]:
    exact: dict[str, list[str]] = {}
    loose: dict[str, list[str]] = {}
    for name in names:
        for table, key in zip((exact, loose), _keys(name), strict=True):
            table.setdefault(key, []).append(name)
    # A key that several texts share says nothing: which of them is the caption?
    unclear = [key for key, found in loose.items() if len({Path(name).suffix for name in found}) < len(found)]
    return {key: found for key, found in loose.items() if key not in unclear} | exact


def _keys(name: str) -> tuple[str, str]:
    """Name without its last suffix; and webdataset's key, up to the first dot, written as no stem is."""
    folder, _, base = name.rpartition("/")
    return name[: -len(Path(name).suffix)], f"{folder}/{base.split('.', 1)[0]}."


def _read_journal(journal: Path) -> list[Entry] | None:
    if not journal.is_file():
        return None
    entries = [Entry(**json.loads(line)) for line in journal.read_text(encoding="utf-8").splitlines()]
    # Somebody may have tidied up.
    return entries if all(os.path.isfile(entry.path) for entry in entries) else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process takes out a tar; another that wants the same waits, and finds the journal."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
