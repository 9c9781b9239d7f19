"""What real ranks hold of a small model, for comparison with a dry run's views of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from planner_activations import TINY

from megatron_video.device import initialize
from megatron_video.dit import build_dit
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.checkpoint import TrainState, save_checkpoint
from training.config import EMAConfig, PretrainConfig
from training.ema import build_ema
from training.optimizer import build_optimizer, wrap_data_parallel
from training.optimizer_config import AdamWConfig

Shapes = dict[str, tuple[int, ...]]


def held_on_this_rank(fields: dict[str, Any], folder: str | None = None) -> tuple[list[Shapes], dict[str, list[int]]]:
    """Names and shapes of every chunk's parameters, and the rank's groups; with a folder, a checkpoint in it."""
    parallel = ParallelConfig(**fields)
    initialize_parallel(parallel, seed=1, device_info=initialize())
    try:
        chunks = build_dit(TINY, parallel, torch.bfloat16, device=torch.device("cpu"))
        shapes = [{name: tuple(value.shape) for name, value in chunk.named_parameters()} for chunk in chunks]
        if folder is not None:
            _save(chunks, parallel, Path(folder))
        return shapes, _groups()
    finally:
        destroy_parallel(keep_distributed=True)


def _save(chunks: list[Any], parallel: ParallelConfig, folder: Path) -> None:
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, AdamWConfig(), parallel)
    ema = build_ema(EMAConfig(decay=0.9), optimizer)
    save_checkpoint(
        folder, model, optimizer, TrainState(step=1), PretrainConfig(model=TINY, parallel=parallel), ema=ema
    )


def _groups() -> dict[str, list[int]]:
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
    }
    return {axis: dist.get_process_group_ranks(group) for axis, group in groups.items()}
