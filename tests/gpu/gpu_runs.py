"""What the GPU tests share: small models with known weights, their losses and gradients, and short trainings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor

from megatron_video import device
from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.fp8 import Fp8Config, set_parameter
from megatron_video.noise import NoiseSource
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.config import AdamWConfig
from training.data import Batch
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import forward_backward, train_step

ROOT = Path(__file__).parent.parent.parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_engine = pytest.mark.skipif(not HAVE_TE, reason="the package transformer-engine is not installed")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")

# Widths are multiples of 128, as the coarsest FP8 recipe asks.
SMALL = DiTConfig(
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=8,
    out_channels=8,
    caption_channels=[64, 32],
)
LOCAL = ParallelConfig()
ENGINE = ParallelConfig(transformer_impl="transformer_engine")


@dataclass(frozen=True)
class Run:
    """Loss and gradients of one step, off the GPU."""

    loss: float
    gradients: dict[str, Tensor]
    """fp32, whole or this tensor-parallel rank's share."""
    shares: dict[str, tuple[int, int, int]]
    """(dimension, share, number of shares) of the cut ones."""


def small_batch(samples: int = 2, latents: tuple[int, int, int] = (3, 4, 6), seed: int = 0) -> Batch:
    """Random numbers; 72 video and 16 text tokens by default, of which some are hidden."""
    source = NoiseSource(seed, "gpu tests")
    frames, height, width = latents
    return Batch(
        latents=source.noise(0, 0, (samples, frames, 8, height, width)),
        timestep=torch.linspace(0.1, 0.9, samples),
        llm_states=source.noise(0, 1, (samples, 11, 64)),
        clip_states=source.noise(0, 2, (samples, 5, 32)),
        text_lengths=torch.tensor([16, 9] * samples)[:samples],
        target=source.noise(0, 3, (samples, frames, 8, height, width)),
    )


def fill(model: VideoDiT) -> None:
    """Weights that depend on their names only, none of them zero, so that every part shows in the output."""
    source = NoiseSource(0, "gpu tests")
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        shape = list(parameter.shape)
        dimension, share, count = _share(parameter)
        shape[dimension] *= count
        noise = source.noise(1, index, tuple(shape))
        norm = parameter.dim() == 1 and not name.endswith("bias")
        value = 1 + 0.1 * noise if norm else noise / shape[-1] ** 0.5
        set_parameter(parameter, value.chunk(count, dim=dimension)[share])


def one_step(
    parallel: ParallelConfig,
    dtype: torch.dtype,
    fp8: Fp8Config | None = None,
    *,
    warm_up: int = 0,
    dit: DiTConfig = SMALL,
    batches: Iterable[Batch] | None = None,
) -> Run:
    """Forward and backward through megatron-core's schedule, after `warm_up` times the same."""
    batches = [small_batch()] if batches is None else list(batches)
    destroy_parallel(keep_distributed=True)
    info = device.initialize()
    initialize_parallel(parallel, seed=1, device_info=info)
    chunks = build_dit(dit, parallel, dtype, device=info.device, fp8=fp8)
    for chunk in chunks:
        fill(chunk)
    model = wrap_data_parallel(chunks, parallel)
    for _ in range(warm_up + 1):
        for chunk in model:
            chunk.zero_grad_buffer()
        total, count = forward_backward(model, batches).sum((0, 2)).tolist()
    parameters = [item for chunk in chunks for item in chunk.named_parameters()]
    gradients = {name: parameter.main_grad.detach().float().cpu().clone() for name, parameter in parameters}
    # Pipeline stages before the last count no loss.
    return Run(total / max(count, 1), gradients, {name: _share(parameter) for name, parameter in parameters})


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20))


def gradient_errors(actual: Run, expected: Run) -> dict[str, float]:
    """Relative error of every parameter's gradient; that of `expected` is cut where that of `actual` is."""
    errors = {}
    for name, gradient in actual.gradients.items():
        dimension, share, count = actual.shares[name]
        errors[name] = relative_error(gradient, expected.gradients[name].chunk(count, dim=dimension)[share])
    return errors


def trained_losses(
    parallel: ParallelConfig, fp8: Fp8Config | None, steps: int, dit: DiTConfig = SMALL, samples: int = 16
) -> list[float]:
    """Losses of a training from scratch in bf16 on data that can be learnt: the text says what the video is."""
    destroy_parallel(keep_distributed=True)
    info = device.initialize()
    initialize_parallel(parallel, seed=1, device_info=info)
    chunks = build_dit(dit, parallel, torch.bfloat16, device=info.device, init_seed=0, fp8=fp8)
    model = wrap_data_parallel(chunks, parallel)
    settings = AdamWConfig(learning_rate=1e-3, warmup_steps=20)
    optimizer = build_optimizer(model, settings, parallel)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, settings.learning_rate * min(1.0, (step + 1) / 20), settings.weight_decay)
        losses.append(train_step(model, optimizer, [learnable_batch(step, samples)]).loss)
    return losses


def learnable_batch(step: int, samples: int) -> Batch:
    """Noised copies of eight fixed videos, each with a text of its own."""
    source = NoiseSource(0, "gpu training")
    kinds = (torch.arange(samples) + step) % 8
    data = source.noise(0, 0, (8, 3, 8, 4, 6))[kinds]
    noise = source.noise(1, step, (samples, 3, 8, 4, 6))
    time = (torch.arange(samples) + 0.5) / samples
    shown = time[:, None, None, None, None]
    return Batch(
        latents=(1 - shown) * noise + shown * data,
        timestep=time,
        llm_states=source.noise(0, 1, (8, 11, 64))[kinds],
        clip_states=source.noise(0, 2, (8, 5, 32))[kinds],
        text_lengths=torch.full((samples,), 16),
        target=data - noise,
    )


def on_cpu(function: str, *arguments: object) -> None:
    """Run a function of checkpoint_runs.py in a process that has neither CUDA nor Transformer Engine."""
    # megatron-core takes Transformer Engine's Adam wherever it finds it, also where it cannot run.
    code = (
        "import sys; sys.modules['transformer_engine'] = None; "
        f"sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]; "
        f"import checkpoint_runs; checkpoint_runs.{function}(*{arguments!r})"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def _share(parameter: Tensor) -> tuple[int, int, int]:
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return 0, 0, 1
    return int(parameter.partition_dim), parallel_state.get_tensor_model_parallel_rank(), size  # type: ignore[attr-defined]
