"""Everything a megatron-core distributed checkpoint holds, by its stored names: weights, averages, optimizer, objects.

The metadata of torch's distributed checkpoints is a pickle; only the classes it consists of are let through.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoints_tools.torch_records import read_record
from megatron_video.errors import UserError
from training.optimizer_state import EMA_PREFIX, MOMENTS

METADATA_FILE = ".metadata"
Part = Literal["weights", "averages", "optimizer", "objects"]
# stored prefix -> (part, which of a parameter's tensors); what has none of them is a weight
PREFIXES: dict[str, tuple[Part, str]] = {
    f"{EMA_PREFIX}.": ("averages", "ema"),
    **{f"optimizer.state.{role}.": ("optimizer", role) for role in ("param", *MOMENTS)},
}
# All that the metadata may be made of: module -> names.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size"},
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, or an object, and the bytes that hold it."""

    offsets: tuple[int, ...]
    """Of its first element within the tensor; empty for an object."""
    sizes: tuple[int, ...]
    file: str
    """Relative to the checkpoint's folder."""
    start: int
    """First byte in the file."""
    length: int
    """Bytes in the file."""


@dataclass(frozen=True)
class Entry:
    """A tensor or an object of a checkpoint."""

    fqn: str
    """Its name there: the parameter's, with a prefix unless it is a weight."""
    part: Part
    role: str
    """weight, ema, param (fp32 weight of the optimizer), exp_avg, exp_avg_sq, or object."""
    name: str
    """Our name of the parameter that it belongs to; of an object, its own."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for an object."""
    chunks: tuple[Chunk, ...]

    @property
    def template(self) -> Tensor:
        """Shape and dtype of a tensor, on the meta device."""
        assert self.dtype is not None, self.fqn
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def elements(self) -> int:
        """Values of the whole tensor; 0 for an object."""
        return 0 if self.dtype is None else torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Of the whole tensor in memory; of an object, in its file."""
        return sum(c.length for c in self.chunks) if self.dtype is None else self.elements * self.dtype.itemsize


class CoreContents:
    """All entries of one checkpoint folder, read one at a time; the model is not built."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata of `folder`.

        Raises:
            UserError: there is none, or it is damaged, or it is a pickle of something else.
        """
        self.folder = folder
        metadata = read_metadata(folder)
        places: dict[str, list[tuple[MetadataIndex, Any]]] = {}
        for index, info in metadata.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise UserError(f"{folder}: {index.fqn} is stored compressed ({info.transform_descriptors}); not read")
            places.setdefault(index.fqn, []).append((index, info))
        self.entries = {
            fqn: _entry(fqn, stored, places.get(fqn, [])) for fqn, stored in metadata.state_dict_metadata.items()
        }
        """Stored name -> entry."""
        self.unlisted = sorted(places.keys() - self.entries.keys())
        """Names of which the metadata says where they lie, but not what they are."""

    @cached_property
    def common(self) -> dict[str, Any]:
        """Values that are no tensors, such as "optimizer updates", from common.pt.

        Raises:
            UserError: it cannot be read, or holds more than plain values.
        """
        path = self.folder / COMMON_STATE_FNAME
        if not path.is_file():
            return {}
        try:
            values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise UserError(f"{path} cannot be read: {_first_line(error)}") from None
        return values

    def of_part(self, *parts: Part) -> dict[str, Entry]:
        """The entries of these parts, by stored name."""
        return {fqn: entry for fqn, entry in self.entries.items() if entry.part in parts}

    def tensor(self, fqn: str) -> Tensor:
        """One whole tensor, put together from its chunks, in its stored dtype.

        Raises:
            UserError: a chunk lacks, or cannot be read.
        """
        entry = self.entries[fqn]
        if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.shape:
            return self.chunk(fqn, entry.chunks[0])
        return self.box(fqn, (0,) * len(entry.shape), entry.shape)

    def box(self, fqn: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a tensor: only the chunks that it meets are read.

        Raises:
            UserError: they do not cover the box, or cannot be read.
        """
        entry = self.entries[fqn]
        assert entry.dtype is not None
        result = torch.empty(tuple(sizes), dtype=entry.dtype)
        covered = 0
        for chunk in entry.chunks:
            common = _overlap(chunk, offsets, sizes)
            if common is None:
                continue
            here, there = common
            target = result[here]
            target.copy_(self.chunk(fqn, chunk)[there])
            covered += target.numel()
        if covered != result.numel():
            raise UserError(f"{self.folder}: the chunks of {fqn} hold {covered} of {result.numel()} values")
        return result

    def chunk(self, fqn: str, chunk: Chunk) -> Tensor:
        """One chunk as it is stored.

        Raises:
            UserError: it cannot be read, or is not what the metadata says.
        """
        try:
            entry = self.entries[fqn]
            assert entry.dtype is not None
            found = read_record(self.folder / chunk.file, chunk.start, chunk.length, entry.dtype, chunk.sizes)
            if found is not None:
                return found
            with open(self.folder / chunk.file, "rb") as file:
                view = _create_file_view(file, chunk.start, chunk.length)
                found = torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)
        # A flipped bit may show as any error of the zip reader or of the unpickler.
        except Exception as error:
            raise UserError(f"{self.folder / chunk.file}: {fqn} cannot be read: {_first_line(error)}") from None
        if not isinstance(found, Tensor) or (found.dtype, tuple(found.shape)) != (self.entries[fqn].dtype, chunk.sizes):
            raise UserError(f"{self.folder / chunk.file}: {fqn} is not the tensor that {METADATA_FILE} says")
        return found

    def object_bytes(self, fqn: str) -> bytes:
        """The bytes of an object, to be copied: they are a pickle, and nothing here opens it.

        Raises:
            UserError: they cannot be read.
        """
        (place,) = self.entries[fqn].chunks
        try:
            with open(self.folder / place.file, "rb") as file:
                file.seek(place.start)
                found = file.read(place.length)
        except OSError as error:
            raise UserError(f"{self.folder / place.file} cannot be read ({error.strerror})") from None
        if len(found) != place.length:
            raise UserError(f"{self.folder / place.file} ends within {fqn}")
        return found


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a torch distributed checkpoint, without running anything that its pickle might ask for.

    Raises:
        UserError: there is none, it is damaged, or it asks for a class that metadata does not consist of.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            found = _MetadataUnpickler(file).load()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); without it the other files mean nothing") from None
    except _ForeignClassError as error:
        raise UserError(f"{path} is a pickle that asks for {error}, which no checkpoint does; not opened") from None
    # What a damaged pickle raises is not specified.
    except Exception as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from None
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise UserError(f"{path} is damaged: it holds a {type(found).__name__}, not the metadata of a checkpoint")
    return found


class _ForeignClassError(pickle.UnpicklingError):
    """Named by module and class."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()) and not _is_dtype(module, name):
            raise _ForeignClassError(f"{module}.{name}")
        return super().find_class(module, name)


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def _entry(fqn: str, stored: Any, places: list[tuple[MetadataIndex, Any]]) -> Entry:
    if isinstance(stored, BytesStorageMetadata):
        chunks = [Chunk((), (), info.relative_path, info.offset, info.length) for _, info in places]
        return Entry(fqn, "objects", "object", fqn, (), None, tuple(chunks))
    assert isinstance(stored, TensorStorageMetadata)
    part, role, name = _belongs(fqn)
    where = {tuple(index.offset or ()): info for index, info in places}
    chunks = []
    for box in stored.chunks:
        info = where.get(tuple(box.offsets))
        # Without a place it can be listed, but not read; `verify` names it.
        file, start, length = (info.relative_path, info.offset, info.length) if info else ("", 0, 0)
        chunks.append(Chunk(tuple(box.offsets), tuple(box.sizes), file, start, length))
    return Entry(fqn, part, role, name, tuple(stored.size), stored.properties.dtype, tuple(chunks))


def _belongs(fqn: str) -> tuple[Part, str, str]:
    for prefix, (part, role) in PREFIXES.items():
        if fqn.startswith(prefix):
            return part, role, fqn.removeprefix(prefix)
    return ("optimizer", "other", fqn) if fqn.startswith("optimizer.") else ("weights", "weight", fqn)


def _overlap(
    chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a box and a chunk meet, as slices of the box and of the chunk."""
    here, there = [], []
    for first, size, start, length in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True):
        low, high = max(first, start), min(first + size, start + length)
        if low >= high:
            return None
        here.append(slice(low - first, high - first))
        there.append(slice(low - start, high - start))
    return tuple(here), tuple(there)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
