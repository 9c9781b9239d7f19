"""How the ranks of a layout cut a checkpoint: which part of every tensor lies with which rank.

Tensor-parallel ranks cut what TENSOR_AXES names, pipeline stages share out whole tensors, replicas of ZeRO-1 cut the
optimizer's state and the averages. Context-parallel ranks and replicas hold the same weights; the first one has them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_video.dit import DiTConfig
from megatron_video.dit.stage import Stage, stages_of_rank
from megatron_video.errors import UserError
from megatron_video.layout import Layout
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import ParallelConfig, rank_grid
from training.flat_parts import Box, boxes

# Axis along which tensor-parallel ranks cut a tensor: 0 the outputs of column-parallel linears, 1 the inputs of
# row-parallel ones. Every rank has all of what is not named here. Rows of fused projections are [heads, 3 or 2, d], and
# the ranks' number divides the heads, so that an equal cut keeps heads whole. `#` is a layer's number.
TENSOR_AXES = {
    "time_conditioning.modulation_linear.weight": 0,
    "time_conditioning.modulation_linear.bias": 0,
    "layers.#.self_attention.linear_qkv.weight": 0,
    "layers.#.self_attention.linear_proj.weight": 1,
    "layers.#.cross_attention.linear_q.weight": 0,
    "layers.#.cross_attention.linear_kv.weight": 0,
    "layers.#.cross_attention.linear_proj.weight": 1,
    "layers.#.mlp.linear_fc1.weight": 0,
    "layers.#.mlp.linear_fc2.weight": 1,
}
# Stages that have what is outside of the layers; of the embedders, which every stage has, the first one's copy counts.
FIRST_STAGE, LAST_STAGE = ("patch_embedding.", "time_conditioning.", "text_projection."), ("head.",)
# On all stages: their gradients are summed over stages.
EMBEDDERS = ("time_conditioning.", "text_projection.")
_LAYER = re.compile(r"layers\.(\d+)\.")

# Of megatron-core 0.16.1's buffers, in elements (distributed/param_and_grad_buffer.py, distributed_data_parallel.py).
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
_LEAST_BUCKET, _BUCKET_PER_REPLICA = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Cut:
    """A box of a tensor, and the rank that holds it."""

    offsets: tuple[int, ...]
    """Of its first element within the whole tensor."""
    sizes: tuple[int, ...]
    rank: int


@dataclass(frozen=True)
class _Held:
    """One tensor-parallel cut of a parameter."""

    box: Box
    tensor_rank: int


class CoreLayout:
    """The cuts of every tensor of a DiT under one layout."""

    def __init__(
        self, dit: DiTConfig, parallel: ParallelConfig, shapes: Mapping[str, tuple[int, ...]], data_parallel_size: int
    ) -> None:
        """Cut the model.

        Args:
            dit: its sizes.
            parallel: the layout.
            shapes: our name -> shape of every parameter, in the order of the model.
            data_parallel_size: replicas.

        Raises:
            UserError: the layout cannot work for this model.
        """
        if data_parallel_size < 1:
            raise UserError(f"data_parallel_size={data_parallel_size}: a number of replicas is at least 1")
        self.ranks = parallel.model_parallel_size * data_parallel_size
        check_layout(Layout(parallel, dit, world_size=self.ranks))
        self._parallel, self._shapes = parallel, shapes
        self._grid = rank_grid(parallel, self.ranks)
        self._stage_of_layer: dict[int, tuple[int, Stage]] = {}
        self._ends: dict[bool, tuple[int, Stage]] = {}
        for pipeline_rank in range(parallel.pipeline_model_parallel_size):
            for stage in stages_of_rank(dit.num_layers, parallel, pipeline_rank):
                self._stage_of_layer |= dict.fromkeys(stage.layer_numbers, (pipeline_rank, stage))
                self._ends |= {last: (pipeline_rank, stage) for last in (False, True) if _is_end(stage, last)}
        self._runs = self._zero1_runs() if parallel.use_distributed_optimizer else {}

    @property
    def names(self) -> list[str]:
        """Our names of the parameters, in the order of the model."""
        return list(self._shapes)

    def weight(self, name: str) -> list[Cut]:
        """Cuts of a weight, in the order of their ranks."""
        pipeline_rank, _ = self._place(name)
        return [self._cut(held.box, pipeline_rank, 0, held.tensor_rank) for held in self._tensor_parallel(name)]

    def state(self, name: str) -> list[Cut]:
        """Cuts of a tensor of the optimizer's state, or of the average, of the weight `name`."""
        if not self._runs:
            return self.weight(name)
        pipeline_rank, _ = self._place(name)
        return [
            self._cut(_inside(held.box, box), pipeline_rank, replica, held.tensor_rank)
            for held in self._tensor_parallel(name)
            for replica, (start, stop) in enumerate(self._runs[name])
            for box in boxes(held.box.shape, start, stop)
        ]

    def object(self, fqn: str) -> int:
        """Rank that holds a byte object, such as the FP8 state of a linear: the first that has its module."""
        pipeline_rank, _ = self._place(fqn)
        return int(self._grid[pipeline_rank, 0, 0, 0])

    def _cut(self, box: Box, pipeline_rank: int, replica: int, tensor_rank: int) -> Cut:
        holders = self._grid[pipeline_rank].flatten(0, 1)
        return Cut(box.offset, box.shape, int(holders[replica, tensor_rank]))

    def _place(self, name: str) -> tuple[int, Stage]:
        layer = _LAYER.match(name)
        return self._stage_of_layer[int(layer[1])] if layer else self._ends[name.startswith(LAST_STAGE)]

    def _tensor_parallel(self, name: str) -> list[_Held]:
        shape, count = tuple(self._shapes[name]), self._parallel.tensor_model_parallel_size
        axis = TENSOR_AXES.get(_LAYER.sub("layers.#.", name))
        if axis is None or count == 1:
            return [_Held(Box((0,) * len(shape), shape), 0)]
        size = shape[axis] // count
        sizes = (*shape[:axis], size, *shape[axis + 1 :])
        return [
            _Held(Box(tuple(rank * size * (place == axis) for place in range(len(shape))), sizes), rank)
            for rank in range(count)
        ]

    def _zero1_runs(self) -> dict[str, list[tuple[int, int]]]:
        """Parameter -> for each replica [start, stop) of the elements of a tensor-parallel cut that it updates."""
        by_chunk: dict[tuple[int, int], list[str]] = {}
        for name in self._shapes:
            pipeline_rank, stage = self._place(name)
            by_chunk.setdefault((pipeline_rank, stage.number), []).append(name)
        runs: dict[str, list[tuple[int, int]]] = {}
        for (pipeline_rank, number), names in by_chunk.items():
            # The others reduce while earlier ones still compute.
            runs |= self._runs_of_chunk(names, cut_into_buckets=pipeline_rank == number == 0)
        return runs

    def _runs_of_chunk(self, names: Sequence[str], cut_into_buckets: bool) -> dict[str, list[tuple[int, int]]]:
        replicas = self.ranks // (
            self._parallel.tensor_model_parallel_size * self._parallel.pipeline_model_parallel_size
        )
        several = len({stage.number for _, stage in self._stage_of_layer.values()}) > 1
        overlap = self._parallel.overlap_grad_reduce and cut_into_buckets
        limit = max(_LEAST_BUCKET, _BUCKET_PER_REPLICA * replicas) if overlap else None
        runs: dict[str, list[tuple[int, int]]] = {}
        sizes = {name: self._tensor_parallel(name)[0].box.elements for name in names}
        alone = {name for name in names if several and name.startswith(EMBEDDERS)}
        for bucket in _buckets(sizes, alone, limit, replicas):
            share = bucket.size // replicas
            for name, start in bucket.starts.items():
                edges = [min(max(replica * share - start, 0), sizes[name]) for replica in range(replicas + 1)]
                runs[name] = list(itertools.pairwise(edges))
        return runs


@dataclass
class _Bucket:
    """Parameters that replicas share out as one run of elements, each an equal part of it."""

    starts: dict[str, int]
    """Parameter -> its first element."""
    size: int
    """With padding."""


def _buckets(elements: Mapping[str, int], alone: set[str], limit: int | None, replicas: int) -> Iterator[_Bucket]:
    """megatron-core's buckets of the parameters of one module, which it takes from the last to the first.

    Args:
        elements: of each parameter.
        alone: parameters that get a bucket of their own.
        limit: elements from which on a bucket is full; None: never.
        replicas: among which each bucket is cut.
    """
    starts: dict[str, int] = {}
    end = 0
    alignment = math.lcm(replicas, _BUCKET_ALIGNMENT)
    for name in reversed(list(elements)):
        start = _up(end, _PARAMETER_ALIGNMENT)
        if name in alone and starts:
            yield _Bucket(starts, _up(start, alignment))
            starts, start = {}, 0
        starts[name], end = start, start + elements[name]
        if name in alone or (limit is not None and end >= limit):
            yield _Bucket(starts, _up(end, alignment))
            starts, end = {}, 0
    if starts:
        yield _Bucket(starts, _up(end, alignment))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _inside(outer: Box, inner: Box) -> Box:
    return Box(tuple(start + more for start, more in zip(outer.offset, inner.offset, strict=True)), inner.shape)


def _is_end(stage: Stage, last: bool) -> bool:
    return stage.is_last if last else stage.is_first
