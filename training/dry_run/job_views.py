"""Every rank of a job: what is built under one rank's view stands for all ranks that provably hold the same.

A rank's weights depend on its pipeline and tensor-parallel place alone, so one view is built for every pair of them.
ZeRO-1 cuts a stage's gradient buckets into equal parts by the rank's place among the replicas: the parts of all ranks
follow from the buckets of one view, and are compared with what the first and the last replica's optimizers took.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from megatron_video.parallel import rank_grid
from training.dry_run.rank_view import Buffers, Coordinates, Cut, Sized, Tensors, View, build_view
from training.optimizer_state import STATE_PREFIXES

Counts = npt.NDArray[np.int64]
Places = npt.NDArray[np.int64]
_FP32 = 4
AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class RankFacts:
    """One rank of the job; sizes in bytes."""

    rank: int
    coordinates: Coordinates
    layers: tuple[range, ...]
    """Of the whole model, by chunk."""
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    """fp32 weights, where the model's are bf16, and two moments; in host memory with optimizer.cpu_offload."""
    ema: int
    """In host memory with ema.device=cpu."""

    @property
    def model_state(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class JobViews:
    """The views of a job."""

    tensors: Tensors
    world_size: int
    views: Mapping[tuple[int, int], View]
    """By pipeline and tensor-parallel place, of the first replica."""
    last: Mapping[int, View]
    """By pipeline place, of the last replica, where there are several."""

    @property
    def built(self) -> int:
        """How many."""
        return len(self.views) + len(self.last)

    @cached_property
    def grid(self) -> Places:
        """Ranks [pp, dp, cp, tp]."""
        grid: Places = rank_grid(self.tensors.parallel, self.world_size).numpy()
        return grid

    def group(self, axis: str, at: Coordinates) -> list[int]:
        """The ranks that differ from a place on one axis alone."""
        place = [at.pp, at.dp, at.cp, at.tp]
        line = tuple(slice(None) if name == axis else place[number] for number, name in enumerate(reversed(AXES)))
        members: list[int] = self.grid[line].tolist()
        return members

    @cached_property
    def ranks(self) -> list[RankFacts]:
        """All of them, in order."""
        return list(self._ranks())

    def _ranks(self) -> Iterator[RankFacts]:
        elements = {pp: self._optimizer_elements(pp) for pp in range(self.grid.shape[0])}
        context, width = self.grid.shape[2], 3 if self.tensors.precision == "bf16" else 2
        for pp, dp, cp, tp in np.ndindex(*self.grid.shape):
            view, main = self.views[pp, tp], int(elements[pp][dp * context + cp])
            yield RankFacts(
                int(self.grid[pp, dp, cp, tp]),
                Coordinates(pp, dp, cp, tp),
                tuple(chunk.layers for chunk in view.chunks),
                view.parameters,
                self._weight_bytes(view),
                self._gradient_bytes(pp),
                main * width * _FP32,
                main * _FP32 if self.tensors.ema else 0,
            )

    @cached_property
    def stored(self) -> dict[str, Sized]:
        """The model's tensors in a checkpoint, whole, by name."""
        return {name: sized for view in self.views.values() for name, sized in view.wanted.items()}

    @cached_property
    def stored_with_optimizer(self) -> dict[str, Sized]:
        """The same with fp32 weights, moments, and averages if there are any."""
        kinds = [prefix for kind, prefix in STATE_PREFIXES.items() if kind != "ema" or self.tensors.ema]
        return self.stored | {
            f"{prefix}.{name}": Sized(sized.shape, torch.float32)
            for prefix in kinds
            for name, sized in self.stored.items()
        }

    @property
    def checkpoint_bytes(self) -> int:
        """Of all tensors of a checkpoint."""
        return sum(sized.bytes for sized in self.stored_with_optimizer.values())

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(sized.elements for sized in self.stored.values())

    def check(self) -> None:
        """Compare what was built with what is said of all ranks.

        Raises:
            RuntimeError: they differ; a fault of this program or of another megatron-core.
        """
        for view in (*self.views.values(), *self.last.values()):
            at = view.coordinates
            said = {axis: self.group(axis, at) for axis in AXES}
            found = {axis: view.groups[axis] for axis in AXES}
            if self.grid[at.pp, at.dp, at.cp, at.tp] != view.rank or said != found:
                raise RuntimeError(f"rank {view.rank}: megatron-core's groups are {found}, expected were {said}")
            place = at.dp * self.grid.shape[2] + at.cp
            if view.buffers is not None and not self.tensors.parallel.use_megatron_fsdp:
                main = int(self._optimizer_elements(at.pp)[place])
                if main != view.buffers.main_elements:
                    raise RuntimeError(
                        f"rank {view.rank}: its optimizer has {view.buffers.main_elements:,} numbers, expected were "
                        f"{main:,}"
                    )

    def _buffers(self, pp: int) -> Buffers:
        buffers = self.views[pp, 0].buffers
        assert buffers is not None
        return buffers

    def _optimizer_elements(self, pp: int) -> Counts:
        """Numbers that the optimizer of each replica updates, in the order of dp, then cp."""
        replicas, buffers = self.grid.shape[1] * self.grid.shape[2], self._buffers(pp)
        if self.tensors.parallel.use_megatron_fsdp:
            # Rows of every parameter: unequal by some, this is the largest whole share.
            return np.full(replicas, -(-self.views[pp, 0].parameters // replicas))
        if not buffers.cuts:
            return np.full(replicas, buffers.main_elements)
        return np.asarray(sum(cut_elements(cut, replicas) for cut in buffers.cuts))

    def _weight_bytes(self, view: View) -> int:
        return self._shared_out(view.weight_bytes, ("optim_grads_params",))

    def _gradient_bytes(self, pp: int) -> int:
        return self._shared_out(self._buffers(pp).gradient_bytes, ("optim_grads", "optim_grads_params"))

    def _shared_out(self, size: int, strategies: Sequence[str]) -> int:
        parallel = self.tensors.parallel
        cut = parallel.use_megatron_fsdp and parallel.data_parallel_sharding_strategy in strategies
        return -(-size // (self.grid.shape[1] * self.grid.shape[2])) if cut else size


def build_views(tensors: Tensors, world_size: int) -> JobViews:
    """Build the views of a job, and compare them with what is said of all ranks.

    Raises:
        UserError: the layout cannot work.
        RuntimeError: what was built is not what was expected.
    """
    grid = rank_grid(tensors.parallel, world_size)
    stages, _, _, pieces = grid.shape
    views = {
        (pp, tp): build_view(tensors, world_size, int(grid[pp, 0, 0, tp]), with_optimizer=tp == 0)
        for pp in range(stages)
        for tp in range(pieces)
    }
    several = grid[0, :, :, 0].numel() > 1
    last = {pp: build_view(tensors, world_size, int(grid[pp, -1, -1, 0])) for pp in range(stages) if several}
    job = JobViews(tensors, world_size, views, last)
    job.check()
    return job


def cut_elements(cut: Cut, replicas: int) -> Counts:
    """Elements of parameters, without padding, in each of the equal parts of a bucket: [replicas]."""
    edges = cut.first + np.arange(replicas + 1) * (cut.elements // replicas)
    # Elements of parameters before each edge: whole ones, and the beginning of the one that it lies in.
    return np.diff(np.clip(edges[:, None] - cut.starts, 0, cut.ends - cut.starts).sum(axis=1))


def span(ranks: Sequence[int]) -> str:
    """A group in few characters: `5`, `0-7`, `0-2992/8` for every eighth."""
    steps = {after - before for before, after in itertools.pairwise(ranks)}
    if len(ranks) == 1 or len(steps) > 1:
        return " ".join(map(str, ranks))
    step = steps.pop()
    return f"{ranks[0]}-{ranks[-1]}" + (f"/{step}" if step > 1 else "")


def layers_text(layers: Sequence[range]) -> str:
    """Such as `0-11` or `0-5 24-29`."""
    return " ".join(f"{part[0]}-{part[-1]}" for part in layers)
