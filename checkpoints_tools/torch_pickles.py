"""What a file of `torch.save` holds, without reading its tensors and without running what its pickle asks for.

The pickle is a few kilobytes; the values of the tensors lie beside it in an uncompressed zip file, and are read from
there when they are asked for, so that a file of any size costs the memory of one tensor.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoints_tools.weights import tensor_bytes
from megatron_video.errors import UserError

TRUST_OPTION = "--trust-pickle"
_LOCAL_HEADER_BYTES = 30
# torch names what it refuses in several sentences, always with this word before it.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

Unpicklable = Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class that may be unpickled, or a stand-in with the full name of the class it stands for."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    start: int
    """Byte of the file at which its storage begins."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Element of the storage at which it begins."""

    @property
    def template(self) -> Tensor:
        """Shape and dtype, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def elements(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    def read(self) -> Tensor:
        """The whole tensor, contiguous, in its stored dtype.

        Raises:
            UserError: the file cannot be read.
        """
        if self.elements == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self._elements(0, extent).as_strided(self.shape, self.stride).contiguous()

    def read_flat(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a contiguous tensor, in one dimension.

        Raises:
            UserError: the file cannot be read.
        """
        assert 0 <= start <= stop <= self.elements, (start, stop, self.shape)
        return self._elements(start, stop)

    def _elements(self, start: int, stop: int) -> Tensor:
        found = torch.empty(stop - start, dtype=self.dtype)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start + (self.offset + start) * self.dtype.itemsize)
                _fill(file, tensor_bytes(found))
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return found


def read_structure(path: Path, trust_pickle: bool = False, harmless: Sequence[Unpicklable] = ()) -> Any:
    """What was saved, with a StoredTensor in the place of every tensor.

    Args:
        path: a file of `torch.save`.
        trust_pickle: run whatever the file asks for; else only tensors, plain values and `harmless` are made.
        harmless: classes that this form of checkpoint is known to hold.

    Raises:
        UserError: it is none, is cut off, or asks for other classes.
    """
    records = _records(path)
    if trust_pickle:
        print(f"warning: {TRUST_OPTION}: running what the pickle in {path} asks for", file=sys.stderr, flush=True)
    try:
        with ExitStack() as stack:
            stack.enter_context(_only(harmless))
            # Tensors without memory, that know where their values lie in the file.
            stack.enter_context(FakeTensorMode())
            found = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from None
    # A damaged pickle may raise anything.
    except Exception as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from None
    return _located(found, path, records)


@contextmanager
def _only(harmless: Sequence[Unpicklable]) -> Iterator[None]:
    """Let these be unpickled and nothing that a library added for itself, as megatron-core does."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(harmless))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _records(path: Path) -> dict[int, zipfile.ZipInfo]:
    """Where the files within a zip file have their first byte."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            return {_data_start(file, info): info for info in archive.infolist() if info.compress_type == 0}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, struct.error) as error:
        raise UserError(
            f"{path} is no whole file of torch.save ({error}): it is cut off, of another program, or in the format of "
            "torch before 1.6; load and save that with torch.save once more"
        ) from None


def _data_start(file: Any, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes)


def _refusal(path: Path, error: Exception) -> str:
    named = _REFUSED_GLOBAL.search(str(error))
    if named is None:
        return f"{path} holds a pickle that is not read: {_first_line(error)}"
    return (
        f"{path} asks to run {named[1]}, which weights do not need; nothing of it was run. If you trust whoever made "
        f"the file, give {TRUST_OPTION}; better, ask them for safetensors"
    )


def _located(value: Any, path: Path, records: dict[int, zipfile.ZipInfo]) -> Any:
    """`value` with StoredTensors for tensors, in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return _stored(value, path, records)
    if isinstance(value, dict):
        return {key: _located(item, path, records) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [_located(item, path, records) for item in value]
    return value


def _stored(tensor: Tensor, path: Path, records: dict[int, zipfile.ZipInfo]) -> StoredTensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{path} holds a tensor of layout {tensor.layout}; only dense ones are read")
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    storage = tensor.untyped_storage()
    if tensor.numel() == 0:
        return StoredTensor(path, 0, tensor.dtype, shape, stride, 0)
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        raise UserError(f"{path} holds a tensor made by its pickle and not stored; it cannot be read one at a time")
    # torch computes places as its own writer leaves them; a file that was packed anew has others.
    if start not in records or records[start].file_size < storage.nbytes():
        raise UserError(f"{path} was packed by another program than torch.save; load and save it with torch once more")
    return StoredTensor(path, start, tensor.dtype, shape, stride, int(tensor.storage_offset()))


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """(dotted name, tensor) of every tensor in nested dicts with names as keys."""
    if isinstance(value, StoredTensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from tensors_in(item, f"{path}.{key}" if path else key)


def _fill(file: Any, target: memoryview) -> None:
    while target:
        count = file.readinto(target)
        if not count:
            raise OSError(None, "it ends within a tensor")
        target = target[count:]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
