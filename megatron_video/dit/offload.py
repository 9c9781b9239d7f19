"""Activations kept in host memory between the forward and the backward pass (megatron-core's fine-grained offloading).

Each branch of a block is one group: what it saves for backward is copied out while the next branches run, and fetched
back while backward runs in those behind it. The copies go along with every pipeline schedule, other than Transformer
Engine's own context for offloading, which megatron-core refuses there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import FineGrainedActivationOffloadingInterface
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


def start_micro_batch(model: nn.Module, config: TransformerConfig, virtual_stage: int | None) -> None:
    """Call before the blocks of a chunk run for a micro-batch."""
    if not config.fine_grained_activation_offloading or not torch.is_grad_enabled():
        return
    FineGrainedActivationOffloadingInterface.init_chunk_handler(
        config.virtual_pipeline_model_parallel_size, virtual_stage, config.min_offloaded_tensor_size
    )
    # Weights are saved for backward too, and stay where they are.
    for parameter in model.parameters():
        parameter.offloading_activation = False  # type: ignore[attr-defined]


def run(name: str, config: TransformerConfig, function: Callable[..., Tensor], x: Tensor, *others: object) -> Tensor:
    """`function(x, *others)`; if `config.offload_modules` holds `name`, its saved activations go to the host."""
    if not _is_offloaded(name, config):
        return function(x, *others)
    with FineGrainedActivationOffloadingInterface(True, x, name) as x:
        output = function(x, *others)
    committed: Tensor = FineGrainedActivationOffloadingInterface.group_commit(output, name)
    return committed


def _is_offloaded(name: str, config: TransformerConfig) -> bool:
    # Megatron-core's groups count on a backward pass that follows.
    if not config.fine_grained_activation_offloading or not torch.is_grad_enabled():
        return False
    return name in (config.offload_modules or ())
