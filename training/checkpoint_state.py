"""What of a model a checkpoint holds, under which names, and how it is cut: the state that megatron-core stores."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer

from megatron_video.dit import VideoDiT
from megatron_video.fp8 import set_parameter
from training.ema import EMA
from training.fsdp import FullyShardedDiT
from training.optimizer_state import EMA_PREFIX, count_updates, sharded_optimizer_state


def _chunk_names(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]


def savable(chunk: Any) -> VideoDiT | FullyShardedDiT:
    """Whoever knows a chunk's tensors: the model itself, bare or wrapped, or what cut them."""
    return chunk if isinstance(chunk, FullyShardedDiT) else getattr(chunk, "module", chunk)


def sharded_chunks(chunks: list[VideoDiT | FullyShardedDiT]) -> dict[str, Any]:
    """The chunks' tensors and objects by the chunk's name; an object that two chunks of a rank share is listed once.

    megatron-core reads one such object for a rank, however many places ask for it.
    """
    state: dict[str, Any] = {}
    seen: set[str] = set()
    for chunk, name in zip(chunks, _chunk_names(chunks), strict=True):
        values = chunk.sharded_rows() if isinstance(chunk, FullyShardedDiT) else chunk.sharded_state_dict()
        objects = {key: value.unique_key for key, value in values.items() if isinstance(value, ShardedObject)}
        state[name] = {key: value for key, value in values.items() if objects.get(key) not in seen}
        seen.update(objects.values())
    return state


def under_ema_names(values: dict[str, Any]) -> dict[str, Any]:
    """Ask for the averages of the tensors, which are fp32, instead of the tensors."""
    return {
        name: replace(value, key=f"{EMA_PREFIX}.{value.key}", data=value.data.detach().float(), dtype=torch.float32)
        for name, value in values.items()
        if isinstance(value, ShardedTensor)
    }


def without_absent_objects(values: dict[str, Any], stored: Container[str]) -> dict[str, Any]:
    """Ask for all tensors, but only for those objects that are among the `stored` keys."""
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, ShardedObject) or value.unique_key in stored
    }


def load_chunks(chunks: list[VideoDiT | FullyShardedDiT], loaded: dict[str, Any]) -> None:
    """Take over what `sharded_chunks` described, once it has been read.

    Raises:
        RuntimeError: the model and the checkpoint have different tensors.
    """
    for chunk, name in zip(chunks, _chunk_names(chunks), strict=True):
        if isinstance(chunk, FullyShardedDiT):
            chunk.load_rows(loaded[name])
            continue
        missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
        lost = [key for key in missing if not key.endswith("_extra_state")]
        if lost or unexpected:
            raise RuntimeError(f"{name}: not in the checkpoint: {lost}; only in the checkpoint: {unexpected}")
        for key, parameter in chunk.named_parameters():
            if is_float8tensor(parameter):
                set_parameter(parameter, loaded[name][key])


def sharded_state(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, is_loading: bool, ema: EMA | None
) -> dict[str, Any]:
    """All that this rank saves, or loads into: weights, optimizer, averages."""
    state = sharded_chunks([savable(chunk) for chunk in model])
    state["optimizer"] = sharded_optimizer_state(optimizer, dict(state), is_loading, ema)
    if not is_loading:
        state["optimizer updates"] = count_updates(optimizer)
        # Readers without Transformer Engine must be able to load what is kept in FP8.
        force_all_tensors_to_non_fp8(state)
    return state


def publish_pending_parameters(model: list[DistributedDataParallel]) -> None:
    """With overlapped gathers the last update of other ranks' shards arrives only in the next forward pass."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather and not isinstance(chunk, FullyShardedDiT):
            chunk.start_param_sync(force_sync=True)
