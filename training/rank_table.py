"""Who is where: host, process and coordinates of every rank, gathered once at the start."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class RankPlace:
    """One rank."""

    rank: int
    host: str
    pid: int
    coordinates: dict[str, int]
    """Its place on each axis: tp, cp, dp, pp."""

    def __str__(self) -> str:
        axes = " ".join(f"{axis} {place}" for axis, place in self.coordinates.items())
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, {axes})"


@dataclass(frozen=True)
class RankTable:
    """All ranks of this start of the job."""

    start: str
    """Name of this start, equal on all ranks and used by no other."""
    places: list[RankPlace]
    """By rank."""
    rank: int
    """This rank."""

    @property
    def here(self) -> RankPlace:
        """This rank's own place."""
        return self.places[self.rank]

    @property
    def neighbours(self) -> list[RankPlace]:
        """The ranks of this host, this one included."""
        return [place for place in self.places if place.host == self.here.host]


def gather_rank_table() -> RankTable:
    """Collect every rank's place; a collective of all ranks."""
    place = RankPlace(dist.get_rank(), platform.node(), os.getpid(), _coordinates())
    start = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (start, asdict(place)))
    return RankTable(everyone[0][0], [RankPlace(**values) for _, values in everyone], dist.get_rank())


def _coordinates() -> dict[str, int]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "cp": parallel_state.get_context_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
    }
