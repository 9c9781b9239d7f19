"""What one rank of a job builds: the real model, gradient buffers and optimizer, on the meta device, among fake groups.

Nothing is started and nobody else takes part, so a job of any size can be looked at from any of its ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_video.config_io import config_to_dict
from megatron_video.device import DeviceInfo, initialize
from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.layout import Precision
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.checkpoint_state import sharded_chunks
from training.config import PretrainConfig
from training.dry_run.meta_device import on_meta
from training.main_parameters import main_parameters
from training.optimizer import build_optimizer, wrap_data_parallel
from training.optimizer_config import AdamWConfig

Offsets = npt.NDArray[np.int64]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Tensors:
    """What decides the tensors of a rank, and nothing else of a run."""

    model: DiTConfig
    parallel: ParallelConfig
    precision: Precision
    ema: bool
    """Whether averages of the weights are kept."""

    @staticmethod
    def of(config: PretrainConfig) -> Tensors:
        """Those of a run."""
        # Recomputation changes activations alone: stages that differ in it share their views.
        parallel = replace(
            config.parallel, recompute_granularity=None, recompute_num_layers=None, recompute_modules=["core_attn"]
        )
        return Tensors(config.model, parallel, config.training.precision, config.ema.decay is not None)

    @property
    def key(self) -> str:
        """Equal for equal ones."""
        plain = [config_to_dict(self.model), config_to_dict(self.parallel), self.precision, self.ema]
        return json.dumps(plain, sort_keys=True)

    @property
    def built(self) -> ParallelConfig:
        """The layout with layers of torch and replicated weights: names, shapes and cuts over TP and PP are the same.

        Transformer Engine cannot be had on a login node, and Megatron-FSDP wants tensors that have memory.
        """
        fsdp = self.parallel.use_megatron_fsdp
        needs_engine = self.parallel.cp_comm_type in ("p2p", "a2a+p2p")
        return replace(
            self.parallel,
            transformer_impl="local",
            use_megatron_fsdp=False,
            use_distributed_optimizer=self.parallel.use_distributed_optimizer and not fsdp,
            cp_comm_type="all_gather" if needs_engine else self.parallel.cp_comm_type,
            hierarchical_context_parallel_sizes=None,
            fine_grained_activation_offloading=False,
        )


@dataclass(frozen=True)
class Coordinates:
    """Place of a rank on every axis."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Sized:
    """A tensor without its numbers: a parameter as a rank holds it, or the whole of one as a checkpoint does."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of memory."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Chunk:
    """A rank's module: its stage, or one chunk of it under the interleaved schedule."""

    layers: range
    """Of the whole model."""
    has_embedding: bool
    """Whether patches come in here."""
    has_head: bool
    """Whether the prediction comes out here."""
    parameters: Mapping[str, Sized]
    """By their names in the whole model."""


@dataclass(frozen=True)
class Cut:
    """A gradient bucket that ZeRO-1 cuts into equal parts, one for every replica in turn."""

    first: int
    """Place of its first element in the buffer."""
    elements: int
    """With padding."""
    starts: Offsets
    """Places of the parameters in it, in rising order, ..."""
    ends: Offsets
    """... and of what follows each."""


@dataclass(frozen=True)
class Buffers:
    """Gradients and optimizer of one rank."""

    gradient_bytes: int
    """Of the fp32 sums, with padding."""
    main_elements: int
    """Numbers that its optimizer updates."""
    cuts: list[Cut]
    """Empty where every replica has the whole optimizer."""


@dataclass(frozen=True)
class View:
    """What one rank holds between two steps."""

    rank: int
    coordinates: Coordinates
    groups: Mapping[str, list[int]]
    """Ranks it talks to, itself among them, by axis."""
    chunks: list[Chunk]
    wanted: Mapping[str, Sized]
    """The model's tensors in a checkpoint, by name, of which it has all or a part."""
    buffers: Buffers | None
    """None where they were not built."""

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        return sum(parameter.elements for chunk in self.chunks for parameter in chunk.parameters.values())

    @property
    def weight_bytes(self) -> int:
        """Of the weights that it computes with."""
        return sum(parameter.bytes for chunk in self.chunks for parameter in chunk.parameters.values())


def build_view(tensors: Tensors, world_size: int, rank: int, with_optimizer: bool = True) -> View:
    """Build what `rank` of `world_size` would build.

    Raises:
        UserError: the layout cannot work.
        RuntimeError: torch.distributed runs already.
    """
    with rank_view(tensors.built, world_size, rank):
        dtype = DTYPES[tensors.precision]
        chunks = build_dit(tensors.model, tensors.built, dtype, device=torch.device("meta"))
        return View(
            rank,
            _coordinates(),
            _groups(),
            [_chunk(chunk) for chunk in chunks],
            _wanted(sharded_chunks(list(chunks))),
            _buffers(tensors, chunks) if with_optimizer else None,
        )


@contextmanager
def rank_view(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[None]:
    """This process as one rank of a job whose other ranks are not there, with the meta device as its device."""
    if dist.is_initialized():
        raise RuntimeError("a rank's view needs a process without process groups of its own")
    initialize()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        # gloo as the backend: no groups beside those of the (fake) default one.
        initialize_parallel(parallel, 0, DeviceInfo(torch.device("meta"), "gloo"))
        with on_meta():
            yield
    finally:
        destroy_parallel()


def _buffers(tensors: Tensors, chunks: list[VideoDiT]) -> Buffers:
    parallel = tensors.built
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, AdamWConfig(), parallel)
    held = [buffer for chunk in model for buffer in chunk.buffers]
    mains = [item.main for item in main_parameters(optimizer) if item.main is not None]
    return Buffers(
        sum(buffer.grad_data.nbytes for buffer in held),
        sum(main.numel() for main in mains),
        [cut for buffer in held for cut in _cuts(buffer)] if parallel.use_distributed_optimizer else [],
    )


def _wanted(state: Any) -> dict[str, Sized]:
    tensors = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
    return {value.key: Sized(tuple(value.global_shape), value.dtype) for value in tensors}


def _chunk(model: VideoDiT) -> Chunk:
    parameters = {name: Sized(tuple(value.shape), value.dtype) for name, value in model.named_parameters()}
    return Chunk(model.stage.layer_numbers, model.stage.is_first, model.stage.is_last, parameters)


def _coordinates() -> Coordinates:
    return Coordinates(
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _groups() -> dict[str, list[int]]:
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp-cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {axis: dist.get_process_group_ranks(group) for axis, group in groups.items()}


def _cuts(buffer: Any) -> Iterator[Cut]:
    places = sorted(place for place in buffer.param_index_map.values())
    for bucket in buffer.buckets:
        own = [place for place in places if place[2] == bucket.bucket_id]
        starts, ends = (np.array([place[side] for place in own], dtype=np.int64) for side in (0, 1))
        yield Cut(bucket.offset, bucket.grad_data.numel(), starts, ends)
