"""Safetensors files, one or several with an index; tensors are read and written one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.buffers import READ_BUFFERS
from checkpoints_tools.growing_file import FileSet
from checkpoints_tools.weights import tensor_bytes
from megatron_video.errors import UserError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
GIGABYTE = 1_000_000_000
# safetensors' names of types
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class _Place:
    path: Path
    template: Tensor
    start: int
    """Byte of the file."""


class SafetensorsFiles:
    """The tensors of one or several safetensors files as one mapping; nothing stays open or mapped."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the files' headers.

        Raises:
            UserError: a file that is not safetensors or was cut off; a tensor that two files hold.
        """
        self._places: dict[str, _Place] = {}
        self.metadata: dict[str, str] = {}
        """What the files' headers say beside the tensors."""
        for path in paths:
            places, metadata = _read_header(path)
            self.metadata |= metadata
            for name, place in places.items():
                if name in self._places:
                    raise UserError(f"{name} is in {self._places[name].path} and in {path}; give one of them alone")
                self._places[name] = place

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Stored name -> shape and dtype, on the meta device, in the order of the files."""
        return {name: place.template for name, place in self._places.items()}

    def path(self, name: str) -> Path:
        """File that holds a tensor."""
        return self._places[name].path

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype.

        Raises:
            UserError: the file became shorter.
        """
        place = self._places[name]
        tensor = READ_BUFFERS.empty(place.template.shape, place.template.dtype)
        # Read, not mapped: mapped pages count as this process's memory.
        read_into(place.path, place.start, tensor_bytes(tensor))
        return tensor


def read_into(path: Path, start: int, buffer: memoryview) -> None:
    """Fill a writable buffer of bytes with a file's bytes from `start` on.

    Raises:
        UserError: the file ends before.
    """
    view = buffer
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise UserError(f"{path} ends {len(view)} bytes too early; restore it")
            view = view[count:]


def find_weight_files(folder: Path, stem: str | None = None) -> list[Path]:
    """The files of a folder's weights: those its index names, or STEM.safetensors, or all *.safetensors.

    Raises:
        UserError: there are none; several indexes; an index that is damaged, names files that are not there or files
            outside of the folder, or that does not say which tensors the files hold.
    """
    single = folder / f"{stem}{SUFFIX}"
    indexes = [folder / f"{stem}{INDEX_SUFFIX}"] if stem else sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    indexes = [path for path in indexes if path.is_file()]
    if len(indexes) > 1:
        raise UserError(f"{folder} has several indexes: {', '.join(path.name for path in indexes)}; leave one there")
    if indexes:
        return _indexed_files(indexes[0])
    files = [single] if stem and single.is_file() else sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(f"{folder} has no {SUFFIX} file")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not an index of safetensors files: {type(error).__name__} {error}") from None
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names files outside of its folder: {', '.join(outside[:5])}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
    found = {tensor: name for name in names for tensor in _read_header(index.parent / name)[0]}
    wrong = sorted(tensor for tensor in {*found, *weight_map} if found.get(tensor) != weight_map.get(tensor))
    if wrong:
        raise UserError(f"{index} and its files disagree on where these are: {', '.join(wrong[:5])}")
    return [index.parent / name for name in names]


def _read_header(path: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    try:
        # The library checks the whole header, also against the file's length; it does not tell where tensors lie.
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    metadata: dict[str, str] = header.pop("__metadata__", {})
    unknown = [f"{name} {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in DTYPES]
    if unknown:
        raise UserError(f"{path} holds types that are not known here: {', '.join(unknown[:5])}")
    places = {
        name: _Place(
            path,
            torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta"),
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return places, metadata


def plan_files(templates: Mapping[str, Tensor], stem: str, file_bytes: int | None) -> dict[str, list[str]]:
    """File name -> the tensors it will hold, in order: files of at most `file_bytes` where single tensors allow it.

    Args:
        templates: stored name -> shape and dtype.
        stem: of STEM.safetensors, or of STEM-00001-of-00006.safetensors and so on.
        file_bytes: None: one file.
    """
    files: list[list[str]] = [[]]
    size = 0
    for name, template in templates.items():
        if files[-1] and file_bytes is not None and size + template.nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += template.nbytes
    if len(files) == 1:
        return {f"{stem}{SUFFIX}": files[0]}
    return {f"{stem}-{i:05d}-of-{len(files):05d}{SUFFIX}": names for i, names in enumerate(files, start=1)}


class SafetensorsSink(FileSet):
    """Takes tensors, one after the other, into files that the safetensors library reads; a transfer.Sink."""

    def __init__(
        self,
        folder: Path,
        templates: Mapping[str, Tensor],
        stem: str,
        file_bytes: int | None,
        stored_names: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Plan the files; see `plan_files`.

        Args:
            folder: an existing one.
            templates: name -> shape and dtype, of every tensor.
            stem: of the files' names.
            file_bytes: largest file; None: one file.
            stored_names: name -> name in the files; None: the same.
            metadata: what the headers say beside the tensors.

        Raises:
            UserError: a type that safetensors has not.
        """
        super().__init__(folder)
        unknown = [f"{name} {each.dtype}" for name, each in templates.items() if each.dtype not in _NAMES]
        if unknown:
            raise UserError(f"safetensors files cannot hold {', '.join(unknown[:5])}")
        self._stem, self._templates, self._metadata = stem, templates, metadata or {}
        self._stored_names = stored_names or {name: name for name in templates}
        # Widest types first, so that every tensor starts at a multiple of its element size.
        self._contents = {
            file: sorted(names, key=lambda name: -templates[name].element_size())
            for file, names in plan_files(templates, stem, file_bytes).items()
        }
        self._file_of = {name: file for file, names in self._contents.items() for name in names}

    @property
    def names(self) -> Sequence[str]:
        """Tensors in the order in which they must come."""
        return list(self._file_of)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(template.nbytes for template in self._templates.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor."""
        file_name = self._file_of[name]
        content = self._contents[file_name]
        file = self.file(file_name)
        if content[0] == name:
            templates = {self._stored_names[each]: self._templates[each] for each in content}
            file.write(_header(templates, self._metadata))
        file.write(tensor_bytes(tensor.contiguous()))
        if content[-1] == name:
            self.end(file_name)

    def finish(self) -> None:
        """Write the index if there are several files; all is on the disk then."""
        if len(self._contents) > 1:
            placed = {self._stored_names[name]: file for name, file in self._file_of.items()}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(placed.items()))}
            self.file(f"{self._stem}{INDEX_SUFFIX}").write((json.dumps(index, indent=2) + "\n").encode())
        self.end_all()


def _header(templates: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name, template in templates.items():
        end = start + template.nbytes
        header[name] = {
            "dtype": _NAMES[template.dtype],
            "shape": list(template.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
