"""What one rank does in a layout test: build, train a few steps on its share of fixed micro-batches, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import (
    ParallelConfig,
    data_parallel_rank,
    data_parallel_size,
    destroy_parallel,
    initialize_parallel,
)
from training.config import AdamWConfig
from training.data import Batch
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import train_step

STEPS = 3
MODEL = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 6,
    "out_channels": 6,
    "caption_channels": [24, 12],
}
# (frames, height, width, samples): images beside videos, and token counts that 2 does not divide
SHAPES = ((3, 3, 3, 2), (1, 4, 4, 3), (3, 2, 5, 1), (2, 3, 3, 2))


@dataclass
class Part:
    """One parameter as this rank holds it."""

    value: np.ndarray
    gradient: np.ndarray | None
    partition_dim: int


@dataclass
class Report:
    """What one rank saw."""

    losses: list[float]
    grad_norms: list[float]
    parts: dict[str, Part]
    tensor_rank: int


def train(layout: dict[str, Any], dtype: str = "float32") -> Report:
    """Three AdamW steps over four micro-batches of mixed shapes, shared out over the replicas."""
    parallel = ParallelConfig(**layout)
    destroy_parallel(keep_distributed=True)
    initialize_parallel(parallel, seed=11, device_info=device.initialize())
    chunks = build_dit(DiTConfig(**MODEL), parallel, getattr(torch, dtype), device=torch.device("cpu"), init_seed=5)
    for chunk in chunks:
        _leave_no_zero(chunk)
    model = wrap_data_parallel(chunks, parallel)
    # A large eps: with the usual 1e-8, rounding noise of vanishing gradients would move parameters by whole steps.
    optimizer = build_optimizer(model, AdamWConfig(learning_rate=1e-3, eps=1e-4), parallel)
    set_learning_rate(optimizer, 1e-3, 0.01)
    batches = micro_batches()[data_parallel_rank() :: data_parallel_size()]
    results = [train_step(model, optimizer, batches) for _ in range(STEPS)]
    if parallel.overlap_param_gather:
        for chunk in model:
            chunk.start_param_sync(force_sync=True)
    with_gradients = not parallel.use_distributed_optimizer
    return Report(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        {name: part for chunk in chunks for name, part in _parts(chunk, with_gradients).items()},
        chunks[0].groups.tp.rank(),
    )


def micro_batches() -> list[Batch]:
    """The same micro-batches on every rank."""
    generator = torch.Generator().manual_seed(23)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batches = []
    for frames, height, width, samples in SHAPES:
        shape = (samples, frames, 6, height, width)
        batches.append(
            Batch(
                latents=normal(*shape),
                timestep=torch.rand(samples, generator=generator),
                llm_states=normal(samples, 7, 24),
                clip_states=normal(samples, 5, 12),
                text_lengths=torch.randint(6, 13, (samples,), generator=generator),
                target=normal(*shape),
            )
        )
    return batches


def _leave_no_zero(chunk: torch.nn.Module) -> None:
    """Move every parameter off its initial zero or one, by the same amount under every layout."""
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            if name.endswith(("modulation_table", "bias", "norm1.weight", "norm2.weight")) and not _is_cut(parameter):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif not parameter.any():
                parameter.add_(0.05)


def _is_cut(parameter: torch.Tensor) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _parts(chunk: torch.nn.Module, with_gradients: bool) -> dict[str, Part]:
    parts = {}
    for name, parameter in chunk.named_parameters():
        gradient = parameter.main_grad.float().numpy().copy() if with_gradients else None
        dimension = int(parameter.partition_dim) if _is_cut(parameter) else -1
        parts[name] = Part(parameter.detach().float().numpy().copy(), gradient, dimension)
    return parts
