"""Tensors read straight out of what torch.save wrote, and the memory that they take by turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_tools.buffers import Buffers
from checkpoints_tools.torch_records import read_record
from megatron_video.errors import UserError


def saved(path: Path, value: object) -> tuple[int, int]:
    """First byte and length of what torch.save wrote into the middle of a file."""
    with open(path, "wb") as file:
        file.write(b"before")
        start = file.tell()
        torch.save(value, file)
        end = file.tell()
        file.write(b"behind")
    return start, end - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (), (700, 900)])
def test_a_plain_tensor_is_read_as_it_was_saved(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 9).to(dtype)
    found = read_record(tmp_path / "file", *saved(tmp_path / "file", tensor), dtype, shape)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    "value", [torch.ones(4, 6).t(), torch.ones(30)[6:], [torch.ones(6, 4)], torch.ones(4, 6), torch.ones(6, 4).double()]
)
def test_anything_else_is_left_to_torch(tmp_path: Path, value: object) -> None:
    assert read_record(tmp_path / "file", *saved(tmp_path / "file", value), torch.float32, (6, 4)) is None


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path, tensor = tmp_path / "file", torch.randn(100, 100)
    start, length = saved(path, tensor)
    content = bytearray(path.read_bytes())
    content[start + length // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        read_record(path, start, length, torch.float32, (100, 100))


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    buffers = Buffers()
    held: list[Tensor] = []
    for number in range(6):
        held.append(buffers.empty((600, 1000), torch.float32).fill_(number))
    # More than are kept may be held at once; a view holds its tensor's memory.
    view, address = held[0][1:3], held[0].data_ptr()
    assert [float(tensor.mean()) for tensor in held] == [0, 1, 2, 3, 4, 5]
    freed = held[1].data_ptr()
    del held[:2]
    again = buffers.empty((1000, 1000), torch.bfloat16)
    assert again.data_ptr() == freed
    other = buffers.empty((600, 1000), torch.float32).fill_(9)
    assert other.data_ptr() not in (address, freed)
    assert float(view.sum()) == 0
    assert [float(tensor.mean()) for tensor in held] == [2, 3, 4, 5]
