"""Are safetensors files and their index right? Headers against the files' sizes, and the index against the headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.safetensors_files import DTYPES, INDEX_SUFFIX, SUFFIX

_LARGEST_HEADER = 100_000_000


def file_faults(path: Path) -> list[str]:
    """All that is wrong with a folder of safetensors files, or with one such file, told without reading a tensor."""
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    headers: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for file in files:
        header, found = _read_header(file)
        headers[file.name] = header
        faults += [f"{file.name}: {fault}" for fault in found]
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}")) if path.is_dir() else []
    for index in indexes:
        faults += [f"{index.name}: {fault}" for fault in _index_faults(index, headers)]
    return [*faults, *_duplicates(headers)]


def _duplicates(headers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    places: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header:
            places.setdefault(name, []).append(file)
    yield from (
        f"{name} is stored {len(files)} times: {', '.join(files)}" for name, files in places.items() if len(files) > 1
    )


def _read_header(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a file, and what is wrong with it; after a fault of the header itself, no tensors."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LARGEST_HEADER):
                return {}, [f"its header is said to have {length} bytes, the file has {size}"]
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        faults = [fault for name, entry in header.items() for fault in _entry_faults(name, entry)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        return {}, [f"its header cannot be read ({type(error).__name__}: {error})"]
    return header, [*faults, *_place_faults(places, size - 8 - length)]


def _entry_faults(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    if entry["dtype"] not in DTYPES:
        yield f"{name} is of the unknown type {entry['dtype']}"
        return
    elements = 1
    for each in entry["shape"]:
        elements *= each
    need, (start, end) = elements * DTYPES[entry["dtype"]].itemsize, entry["data_offsets"]
    if end - start != need:
        yield f"{name} has {end - start} bytes, its shape and type need {need}"


def _place_faults(places: list[tuple[int, int, str]], data_bytes: int) -> Iterator[str]:
    end = 0
    for start, stop, name in places:
        if start != end:
            yield f"{name} begins at byte {start} of the data, the tensor before it ends at {end}"
        end = max(end, stop)
    if end != data_bytes:
        more = "is cut off" if data_bytes < end else "has more at its end"
        yield f"its tensors take {end} bytes, there are {data_bytes}: it {more}"


def _index_faults(index: Path, headers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        placed: dict[str, str] = dict(content["weight_map"])
        total = (content.get("metadata") or {}).get("total_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"it is no index of safetensors files ({type(error).__name__}: {error})"
        return
    missing = sorted(set(placed.values()) - headers.keys())
    yield from (f"it names {file}, which is not there" for file in missing)
    for name, file in placed.items():
        if file in headers and name not in headers[file]:
            real = [other for other, header in headers.items() if name in header]
            yield f"it says that {name} is in {file}" + (f", it is in {real[0]}" if real else "; it is in no file")
    for file, header in headers.items():
        if file not in placed.values():
            yield f"{file} lies beside it, and it does not name it"
            continue
        yield from (f"it does not name {name}, which is in {file}" for name in header if name not in placed)
    found = sum(
        end - start for header in headers.values() for start, end in (e["data_offsets"] for e in header.values())
    )
    if total is not None and not missing and total != found:
        yield f"it says total_size={total}, the tensors have {found} bytes"
