"""Tensors in memory that is used again: the kernel clears fresh memory page by page, which takes longer than a read."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller ones come from the heap, which keeps its pages.
_LEAST_BYTES = 1 << 20
# One that is read, one that is written, one between them.
_KEPT = 3
_HELD_BY_POOL_ALONE = 2  # by the list, and by getrefcount itself


class Buffers:
    """Memory for a few tensors at a time; one that nobody holds any more gives its memory to a later one."""

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content, as torch.empty makes it."""
        count = torch.Size(shape).numel()
        need = count * dtype.itemsize
        if need < _LEAST_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            # The tensor keeps the buffer alive, as long as any view of it lives.
            return torch.frombuffer(self._free(need), dtype=dtype, count=count).view(tuple(shape))

    def _free(self, need: int) -> mmap.mmap:
        for index in range(len(self._kept)):
            if sys.getrefcount(self._kept[index]) == _HELD_BY_POOL_ALONE:
                if len(self._kept[index]) >= need:
                    return self._kept[index]
                del self._kept[index]  # too small: a larger one takes its place
                break
        buffer = mmap.mmap(-1, need, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if len(self._kept) < _KEPT:
            self._kept.append(buffer)
        return buffer


READ_BUFFERS = Buffers()
"""Of all readers of this process."""
