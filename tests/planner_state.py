"""What a small model takes between steps: measured on the ranks of a layout, and as the planner has it."""

from __future__ import annotations

from typing import Any

import torch
from planner_activations import TINY
from torch import Tensor

from megatron_video.device import initialize
from megatron_video.dit import build_dit
from megatron_video.layout import Precision
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.config import EMAConfig
from training.ema import build_ema
from training.main_parameters import main_parameters, only_optimizer
from training.optimizer import ReadyGradients, build_optimizer, wrap_data_parallel
from training.optimizer_config import AdamWConfig
from training.planner.cluster import Cluster
from training.planner.job import Job
from training.planner.memory import peak_memory
from training.planner.shape import ModelShape
from training.planner.work import MicroBatch

PARTS = ("weights", "gradients", "optimizer", "ema")


def predicted_state(fields: dict[str, Any], ranks: int, precision: Precision) -> list[dict[str, float]]:
    """Bytes by part of one rank of every pipeline stage, by the planner."""
    cluster = Cluster(gpu="", gpus=ranks, memory_gib=80, peak_tflops={"bf16": 1}, hbm_gbps=1, nvlink_gbps=1, nic_gbps=1)
    step = {MicroBatch(1, 16): 1.0}
    memory = peak_memory(Job(ModelShape.of(TINY), ParallelConfig(**fields), cluster, step, precision, ema=True))
    return [{name: stage.by_part()[name] for name in PARTS} for stage in memory]


def state_on_this_rank(fields: dict[str, Any], precision: Precision) -> dict[str, int]:
    """Bytes by part after a step, on a rank of a pool."""
    parallel = ParallelConfig(**fields)
    initialize_parallel(parallel, seed=1, device_info=initialize())
    try:
        return _state(parallel, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    finally:
        destroy_parallel(keep_distributed=True)


def _state(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, int]:
    chunks = build_dit(TINY, parallel, dtype, device=torch.device("cpu"))
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, AdamWConfig(), parallel)
    ema = build_ema(EMAConfig(decay=0.9), optimizer)
    assert ema is not None
    # Moments are there from the first step on.
    for chunk in model:
        chunk.zero_grad_buffer()
    ReadyGradients.prepare(optimizer).apply()
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    moments = [tensor for state in only_optimizer(optimizer).optimizer.state.values() for tensor in _tensors(state)]
    weights = {_place(parameter) for parameter in parameters}
    mains = [item.main for item in main_parameters(optimizer) if item.main is not None]
    return {
        "weights": _bytes(parameters),
        "gradients": _bytes([buffer.grad_data for chunk in model for buffer in chunk.buffers]),
        # fp32 weights are updated where they are.
        "optimizer": _bytes([*moments, *(main for main in mains if _place(main) not in weights)]),
        "ema": _bytes([average for average in ema.averages if average is not None]),
    }


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
