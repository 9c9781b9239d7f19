"""How much memory the ranks of a run use."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True)
class MemoryUse:
    """Bytes, each the largest over all ranks."""

    host_rss: int
    """Resident memory of a rank's process, at this moment."""
    cuda_allocated: int = 0
    """Most that tensors have held on one device since the process began; 0 without CUDA."""
    cuda_reserved: int = 0
    """Most that torch has taken from one device."""


def largest_memory_use() -> MemoryUse:
    """Of all ranks, which call it together; one small reduction, in which the host waits for the device."""
    values = [psutil.Process().memory_info().rss, 0, 0]
    if torch.cuda.is_available():
        values[1:] = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # NCCL reduces on the device only.
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        largest = torch.tensor(values, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        values = largest.tolist()
    return MemoryUse(*values)
