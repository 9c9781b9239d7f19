"""Processes of a Video-VAE run: one, or those of torchrun (gloo on the CPU, NCCL with a GPU each)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_video.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks, the same on all of them."""
        if self.world == 1:
            return value
        value = value.contiguous()
        dist.all_reduce(value)
        return value / self.world

    def share(self, size: int) -> slice:
        """This rank's part of a batch of `size` samples, all parts alike.

        Raises:
            UserError: the ranks do not divide the batch.
        """
        if size % self.world:
            raise UserError(f"a batch of {size} does not divide into {self.world} ranks; take a multiple in the stages")
        each = size // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank; all ranks must ask."""
        return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()


def join_ranks(device: str, zero_stage: int | None) -> Ranks:
    """Take part in the run that the environment describes (RANK, WORLD_SIZE: torchrun, deepspeed), or be alone.

    Raises:
        UserError: a GPU is asked for, and there is none, or too few.
    """
    kind = _kind_of_device(device)
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend)
        elif zero_stage is not None:
            # DeepSpeed wants a process group, of one too.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            return Ranks(0, 1, place)
    return Ranks(dist.get_rank(), dist.get_world_size(), place)


def _kind_of_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; take device=cpu or device=auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
