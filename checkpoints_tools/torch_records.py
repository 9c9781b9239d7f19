"""Tensors that torch.save wrote, read straight into memory that is used again, checked by the checksums in there."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from isal import isal_zlib
from torch import Tensor

from checkpoints_tools.buffers import READ_BUFFERS
from checkpoints_tools.safetensors_files import read_into
from checkpoints_tools.weights import tensor_bytes
from megatron_video.errors import UserError

_ONLY_RECORD = "data/0"


def read_record(path: Path, start: int, length: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
    """A tensor out of a part of a file.

    Args:
        path: the file.
        start: first byte of what torch.save wrote.
        length: its bytes.
        dtype: expected type.
        shape: expected shape.

    Returns:
        None if it is not one contiguous tensor of that type and shape; torch.load may know what it is.

    Raises:
        UserError: the bytes are not those that were saved.
    """
    with open(path, "rb") as file:
        view = cast(IO[bytes], _Part(file, start, length))
        try:
            # Everything but the values.
            plan = torch.load(view, map_location="meta", weights_only=True)
            view.seek(0)
            reader = torch._C.PyTorchFileReader(view)
            offset = reader.get_record_offset(_ONLY_RECORD)  # type: ignore[attr-defined]
            little = reader.get_record("byteorder") == b"little"
            entry = next(each for each in zipfile.ZipFile(view).infolist() if each.filename.endswith(_ONLY_RECORD))
        except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, StopIteration, ValueError):
            return None
    tensor = READ_BUFFERS.empty(shape, dtype)
    if not isinstance(plan, Tensor) or not little or not _fits(plan, tensor) or entry.file_size != tensor.nbytes:
        return None
    read_into(path, start + offset, tensor_bytes(tensor))
    if isal_zlib.crc32(tensor_bytes(tensor)) != entry.CRC:
        raise UserError(f"{path}: the checksum of the bytes from {start + offset} on differs from the one saved there")
    return tensor


def _fits(plan: Tensor, tensor: Tensor) -> bool:
    same = (plan.dtype, plan.shape) == (tensor.dtype, tensor.shape)
    return same and plan.is_contiguous() and plan.storage_offset() == 0


class _Part(io.RawIOBase):
    """A part of a file as a file. (torch's own view seeks wrongly from the end, where a zip has its list.)"""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill as much of a buffer as there is."""
        self._file.seek(self._start + self._at)
        with memoryview(buffer) as view, view[: max(self._length - self._at, 0)] as part:
            count = self._file.readinto(part)
        self._at += count
        return count
