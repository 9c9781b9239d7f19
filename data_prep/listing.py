"""Where captions come from: a listing (JSONL, CSV, Parquet) or sidecar files beside the videos.

In a folder every file named captions.* or metadata.* with such a suffix is a listing for the files below it; media that
no listing names get the caption of their sidecar, NAME.txt (plain text) or NAME.json (an object with "caption").
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_video.errors import UserError
from megatron_video.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES

# field -> names under which listings and JSON sidecars may have it, first match wins
FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "path": ("path", "video", "image", "file", "file_name", "filename"),
    "caption": ("caption", "text", "prompt"),
    "language": ("language", "lang"),
    "title": ("title",),
}
LISTING_STEMS = ("captions", "metadata")
LISTING_SUFFIXES = (".jsonl", ".csv", ".parquet")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
SIDECAR_SUFFIXES = (".json", ".txt")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_NAMES_SHOWN = 5
# Letters by which the two languages of the text encoders are told apart (CJK ideographs with extension A).
_CHINESE_RANGES = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x323AF))


@dataclass(frozen=True)
class Entry:
    """One video or image and the caption that was found for it."""

    path: str
    """Absolute."""
    caption: str | None
    language: str | None
    title: str | None = None
    origin: str | None = None
    """TAR::MEMBER for a file that was taken out of a tar; `path` then has its content hash as stem."""
    fault: str | None = None
    """Why this file cannot be taken, if that is known already."""


@dataclass(frozen=True)
class Found:
    """What a folder, a listing or a tar has to offer."""

    entries: list[Entry] = field(default_factory=list)
    """Videos and images, sorted by path."""
    tars: list[Path] = field(default_factory=list)
    """They may hold more; sorted."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Suffix, "hidden" or "links to folders" -> how many of them are in the folder."""


def find_entries(source: Path) -> Found:
    """All media of a folder or a listing, and its tars.

    Raises:
        UserError: nothing there, no media in the folder, or a listing that is damaged or names missing files.
    """
    if source.is_dir():
        return _entries_of_folder(source)
    if not source.is_file():
        raise UserError(f"--in {source}: no such folder, listing or tar")
    if is_tar(source.name):
        return Found(tars=[source.absolute()])
    if source.suffix.lower() in MEDIA_SUFFIXES:
        raise UserError(
            f"--in {source} is a single video or image; give its folder, a tar, or a listing ("
            f"{', '.join(LISTING_SUFFIXES)}) that names it"
        )
    return Found(_sorted_once(_entries_of_listing(source)))


def printable(name: str) -> str:
    """A file's name as UTF-8 can hold it: bytes of it that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_tar(name: str) -> bool:
    """Whether a file of this name is taken for a tar of videos."""
    return name.lower().endswith(TAR_SUFFIXES)


def detect_language(text: str) -> str:
    """'zh' if there is a Chinese character, else 'en' if there is a Latin letter, else 'und'."""
    if any(low <= ord(character) <= high for character in text for low, high in _CHINESE_RANGES):
        return "zh"
    return "en" if any(character.isascii() and character.isalpha() for character in text) else "und"


def _entries_of_folder(folder: Path) -> Found:
    files, passed_over = _files_of(folder)
    listings = sorted(path for path in map(Path, files) if _is_listing(path))
    listed = [entry for path in listings for entry in _entries_of_listing(path)]
    known = {entry.path for entry in listed}
    # A listing wins over a sidecar: it was written on purpose for these files.
    media = (os.path.abspath(file) for file in files if file.lower().endswith(MEDIA_SUFFIXES))
    entries = listed + [_entry_of_sidecar(Path(path)) for path in media if path not in known]
    tars = sorted(Path(file).absolute() for file in files if is_tar(file))
    if not entries and not tars:
        raise UserError(f"--in {folder}: no videos, images or tars in this folder ({', '.join(MEDIA_SUFFIXES)})")
    return Found(_sorted_once(entries), tars, passed_over)


def _files_of(folder: Path) -> tuple[list[str], dict[str, int]]:
    """All files below a folder but hidden ones; and counts of what none of the stages will read."""
    files: list[str] = []
    passed_over: Counter[str] = Counter()
    # Links to folders are not followed: they may lead in a circle.
    for root, folders, names in os.walk(folder):
        passed_over["links to folders"] += sum(os.path.islink(os.path.join(root, name)) for name in folders)
        for name in names:
            if name.startswith("."):
                passed_over["hidden"] += 1
                continue
            files.append(os.path.join(root, name))
            if not (
                name.lower().endswith((*MEDIA_SUFFIXES, *SIDECAR_SUFFIXES, *TAR_SUFFIXES)) or _is_listing(Path(name))
            ):
                passed_over[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    return files, {kind: count for kind, count in sorted(passed_over.items()) if count}


def _is_listing(path: Path) -> bool:
    return path.stem in LISTING_STEMS and path.suffix in LISTING_SUFFIXES


def _entries_of_listing(listing: Path) -> list[Entry]:
    records = read_records(listing)
    entries = [_entry_of_record(listing, number, record) for number, record in enumerate(records, start=1)]
    # All at once: who has to mend a listing wants to know everything that is wrong with it.
    missing = [entry.path for entry in entries if not os.path.isfile(entry.path)]
    if missing:
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        raise UserError(
            f"{listing} names {len(missing)} of {len(entries)} files that do not exist: "
            f"{', '.join(missing[:_NAMES_SHOWN])}{more}; paths are relative to the listing"
        )
    if not entries:
        raise UserError(f"{listing}: the listing is empty")
    return entries


def _entry_of_record(listing: Path, number: int, record: Any) -> Entry:
    if not isinstance(record, dict):
        raise UserError(f"{listing}: entry {number} is not an object with fields, but {record!r}")
    try:
        path, caption, language, title = (_field(record, name) for name in FIELD_NAMES)
    except ValueError as error:
        raise UserError(f"{listing}: entry {number}: {error}") from None
    if not path:
        raise UserError(
            f"{listing}: entry {number} has no path; one of the fields {', '.join(FIELD_NAMES['path'])} must name it, "
            f"and there are: {', '.join(map(repr, record))}"
        )
    return Entry(os.path.abspath(listing.parent / path), caption, language, title)


def _entry_of_sidecar(path: Path) -> Entry:
    if printable(str(path)) != str(path):
        return Entry(printable(str(path)), None, None, fault="name: the file's name is not UTF-8; rename it")
    entry = Entry(str(path), None, None)
    beside = (path.with_suffix(suffix) for suffix in SIDECAR_SUFFIXES)
    try:
        return described(entry, {file.name: file.read_bytes() for file in beside if file.is_file()})
    except OSError as error:
        return replace(entry, fault=f"sidecar: {error.filename} cannot be read: {error.strerror}")


def described(entry: Entry, sidecars: Mapping[str, bytes]) -> Entry:
    """The entry with what its sidecars, by name, say of it: .json, then .txt, whose text is the caption.

    One that cannot be read becomes the entry's fault; a .json beside a .txt may be about anything.
    """
    told = entry
    for name, content in sorted(sidecars.items()):
        try:
            text = content.decode("utf-8-sig")
            if name.lower().endswith(".txt"):
                told = replace(told, caption=text, fault=None)
            else:
                told = _told_by_json(told, json.loads(text))
        except ValueError as error:
            told = replace(told, fault=f"sidecar: {name} cannot be read: {error}")
    return told


def _told_by_json(entry: Entry, record: Any) -> Entry:
    if not isinstance(record, dict):
        raise ValueError("not an object with fields")
    caption, language, title = (_field(record, name) for name in ("caption", "language", "title"))
    return replace(entry, caption=caption, language=language, title=title)


def _field(record: dict[str, Any], name: str) -> str | None:
    values = (record[alias] for alias in FIELD_NAMES[name] if record.get(alias) is not None)
    value = next(values, None)
    if isinstance(value, list | dict):
        raise ValueError(f"{name} is {value!r}, and not a text")
    # JSON can write halves of surrogate pairs, which no UTF-8 has; whole pairs become their character.
    return None if value is None else str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_records(listing: Path) -> list[Any]:
    """Entries of a .jsonl, .csv or .parquet file, as they stand there.

    Raises:
        UserError: another suffix, or not readable as what the suffix says.
    """
    try:
        if listing.suffix == ".parquet":
            records: list[Any] = pq.read_table(listing).to_pylist()
            return records
        # Spreadsheets put a byte order mark in front.
        with open(listing, encoding="utf-8-sig", newline="") as file:
            if listing.suffix == ".csv":
                return [_csv_line(listing, n, record) for n, record in enumerate(csv.DictReader(file), start=1)]
            if listing.suffix == ".jsonl":
                return [_json_line(listing, n, line) for n, line in enumerate(file, start=1) if line.strip()]
    except (UnicodeDecodeError, pa.ArrowInvalid, csv.Error) as error:
        raise UserError(f"{listing} cannot be read as {listing.suffix[1:]}: {error}") from None
    raise UserError(f"{listing}: a listing is one of {', '.join(LISTING_SUFFIXES)}")


def _csv_line(listing: Path, number: int, record: dict[str | None, Any]) -> Any:
    # What is behind the last column has no name.
    if None in record:
        raise UserError(
            f"{listing}: entry {number} has more fields than the first line; put texts with commas in quotes"
        )
    return record


def _json_line(listing: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{listing}: line {number} is not JSON: {error}") from None


def _sorted_once(entries: Iterable[Entry]) -> list[Entry]:
    # Sorted by path: the manifest must not depend on the order of a directory.
    by_path: dict[str, Entry] = {}
    for entry in entries:
        known = by_path.setdefault(entry.path, entry)
        if known.caption != entry.caption:
            raise UserError(f"{entry.path} has two captions in its listings: {known.caption!r} and {entry.caption!r}")
    return [by_path[path] for path in sorted(by_path)]
