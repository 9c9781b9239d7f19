"""What one rank does in a checkpoint test: train and save in one layout, or load in another and go on."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from layout_worker import MODEL, _leave_no_zero, micro_batches

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import (
    ParallelConfig,
    data_parallel_rank,
    data_parallel_size,
    destroy_parallel,
    initialize_parallel,
)
from training.checkpoint import TrainState, load_checkpoint, load_model_weights, save_checkpoint, step_folder
from training.config import AdamWConfig, PretrainConfig
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.optimizer_state import count_updates
from training.train_step import train_step

SETTINGS = AdamWConfig(learning_rate=3e-3, eps=1e-4, weight_decay=0.1)
Numbers = list[tuple[float, float]]


def train_and_save(layout: dict[str, Any], dtype: str, folder: str, steps: int, more: int) -> Numbers:
    """Train `steps`, save, train `more`; (loss, gradient norm) of those that came after the save."""
    model, optimizer = _build(layout, dtype, init_seed=5)
    _train(model, optimizer, steps)
    # megatron-core writes from child processes, which multiprocessing forbids to the daemons of a RankPool.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    config = PretrainConfig(model=DiTConfig(**MODEL), parallel=ParallelConfig(**layout))
    save_checkpoint(Path(folder), model, optimizer, TrainState(step=steps), config)
    return _train(model, optimizer, more)


def load_and_train(layout: dict[str, Any], dtype: str, folder: str, steps: int, more: int) -> Numbers:
    """Load what was saved after `steps` into a model of other weights, and train `more`."""
    model, optimizer = _build(layout, dtype, init_seed=99)
    state = load_checkpoint(step_folder(Path(folder), steps), model, optimizer)
    assert state.step == steps
    assert count_updates(optimizer) == steps
    return _train(model, optimizer, more)


def load_weights(layout: dict[str, Any], dtype: str, folder: str, steps: int) -> Numbers:
    """Load only the weights, then one step with a fresh optimizer."""
    model, optimizer = _build(layout, dtype, init_seed=99, weights=step_folder(Path(folder), steps))
    return _train(model, optimizer, 1)


def _build(layout: dict[str, Any], dtype: str, init_seed: int, weights: Path | None = None) -> tuple[Any, Any]:
    parallel = ParallelConfig(**layout)
    destroy_parallel(keep_distributed=True)
    initialize_parallel(parallel, seed=11, device_info=device.initialize())
    cpu = torch.device("cpu")
    chunks = build_dit(DiTConfig(**MODEL), parallel, getattr(torch, dtype), device=cpu, init_seed=init_seed)
    for chunk in chunks:
        _leave_no_zero(chunk)
    if weights is not None:
        load_model_weights(weights, chunks)
    model = wrap_data_parallel(chunks, parallel)
    return model, build_optimizer(model, SETTINGS, parallel)


def _train(model: Any, optimizer: Any, steps: int) -> Numbers:
    numbers = []
    for _ in range(steps):
        set_learning_rate(optimizer, SETTINGS.learning_rate, SETTINGS.weight_decay)
        result = train_step(model, optimizer, micro_batches()[data_parallel_rank() :: data_parallel_size()])
        numbers.append((result.loss, result.grad_norm))
    return numbers
