"""What one rank does for the matrix: build a small model in a layout, train it for some steps, report what it holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_video import device
from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.parallel import data_parallel_rank, data_parallel_size, initialize_parallel
from training.config import AdamWConfig
from training.data import Batch
from training.ema import EMA
from training.layer_norms import LayerProbe
from training.layout_matrix.table import STEPS, LayoutCase, Workload
from training.main_parameters import MainParameter, main_parameters
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.time_bins import bin_label, mean_by_time
from training.train_step import StepResult, train_step

CHANNELS, LLM_CHANNELS, CLIP_CHANNELS, CLIP_TOKENS = 6, 24, 12, 5
# With the usual eps of 1e-8, rounding noise of vanishing gradients would move parameters by whole steps. Gradients have
# norms of 4 to 12, so clipping acts.
SETTINGS = AdamWConfig(learning_rate=1e-3, eps=1e-4, weight_decay=0.1, clip_grad_norm=0.5)
EMA_DECAY = 0.8
INITIAL_SEED = 5


@dataclass
class Piece:
    """The part of one tensor that a rank holds: a run of a tensor-parallel cut, read row by row."""

    values: np.ndarray
    """Flat fp32."""
    start: int
    """Index of its first value in the cut."""
    shape: tuple[int, ...]
    """Of the cut."""
    partition_dim: int
    """Dimension along which tensor-parallel ranks cut the whole; -1 where each holds all of it."""


@dataclass
class Report:
    """What one rank saw."""

    losses: list[float]
    grad_norms: list[float]
    telemetry: dict[str, float]
    """What the last step measured beside the loss: loss by t, and sizes of activations, gradients and weights."""
    tensor_rank: int
    tensors: dict[str, dict[str, Piece]]
    """Quantity (gradients of the last step, parameters, main_parameters, ema) -> name in the whole model -> piece."""


@dataclass
class Session:
    """A model in training."""

    layout: LayoutCase
    workload: Workload
    chunks: list[VideoDiT]
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    ema: EMA

    def train(self, steps: int) -> Report:
        """`steps` optimizer steps, all on the same global batch."""
        batches = micro_batches(self.workload, self.layout.single_samples)
        ours = batches[data_parallel_rank() :: data_parallel_size()]
        results = []
        for step in range(steps):
            set_learning_rate(self.optimizer, SETTINGS.learning_rate, SETTINGS.weight_decay)
            # On the last step alone, as it is made seldom in a run.
            probe = LayerProbe(self.model, self.optimizer) if step == steps - 1 else None
            results.append(
                train_step(self.model, self.optimizer, ours, probe=probe, pack_positions=self.layout.pack_positions)
            )
            self.ema.update()
        losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
        return Report(losses, norms, _telemetry(results[-1]), self.chunks[0].groups.tp.rank(), self._tensors())

    def _tensors(self) -> dict[str, dict[str, Piece]]:
        # With overlapped gathers the other ranks' part of the last update arrives only in the next forward pass.
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather or chunk.ddp_config.use_megatron_fsdp:
                chunk.start_param_sync(force_sync=True)
        named = [item for chunk in self.chunks for item in chunk.named_parameters()]
        # Megatron-FSDP puts its own tensors in their place.
        names = {getattr(parameter, "orig_param", parameter): name for name, parameter in named}
        tensors: dict[str, dict[str, Piece]] = {
            "parameters": {name: _piece(parameter, parameter, 0) for parameter, name in names.items()},
            "gradients": {},
            "main_parameters": {},
            "ema": {},
        }
        for item, average in zip(main_parameters(self.optimizer), self.ema.averages, strict=True):
            if item.main is None or average is None:
                continue
            name, start = names[item.parameter], item.part.start if item.part else 0
            tensors["gradients"][name] = _piece(item.parameter, _gradient(item), start)
            tensors["main_parameters"][name] = _piece(item.parameter, item.main, start)
            tensors["ema"][name] = _piece(item.parameter, average, start)
        return tensors


def build(layout: LayoutCase, workload: Workload, init_seed: int = INITIAL_SEED) -> Session:
    """The model of the matrix in `layout`, every parameter away from its initial zero or one."""
    parallel = layout.config
    device_info = device.initialize()
    initialize_parallel(parallel, seed=11, device_info=device_info)
    dit = model_config(workload)
    dtype = getattr(torch, workload.dtype)
    chunks = build_dit(dit, parallel, dtype, device=device_info.device, init_seed=init_seed)
    for chunk in chunks:
        _leave_no_zero(chunk, init_seed)
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, SETTINGS, parallel)
    return Session(layout, workload, chunks, model, optimizer, EMA(optimizer, EMA_DECAY))


def model_config(workload: Workload) -> DiTConfig:
    """Sizes that every layout of the table divides, with all conditions on."""
    return DiTConfig(
        num_layers=workload.num_layers,
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        caption_channels=[LLM_CHANNELS, CLIP_CHANNELS],
        use_additional_conditions=True,
        hidden_dropout=workload.hidden_dropout,
    )


def train(layout: LayoutCase, workload: Workload) -> Report:
    """Build and train for the matrix's number of steps."""
    return build(layout, workload).train(STEPS)


def micro_batches(workload: Workload, single_samples: bool = False) -> list[Batch]:
    """The global batch, the same on every rank; with `single_samples` cut into micro-batches of one sample."""
    generator = torch.Generator().manual_seed(workload.seed)
    batches = [_micro_batch(workload, number, generator) for number in range(len(workload.shapes))]
    return [single for batch in batches for single in _single_samples(batch)] if single_samples else batches


def _micro_batch(workload: Workload, number: int, generator: torch.Generator) -> Batch:
    frames, rows, columns, samples = workload.shapes[number]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    llm_tokens = 3 + number % 5
    lengths = torch.randint(CLIP_TOKENS + 1, CLIP_TOKENS + llm_tokens + 1, (samples,), generator=generator)
    return Batch(
        latents=normal(samples, frames, CHANNELS, rows, columns),
        timestep=torch.rand(samples, generator=generator),
        llm_states=normal(samples, llm_tokens, LLM_CHANNELS),
        clip_states=normal(samples, CLIP_TOKENS, CLIP_CHANNELS),
        text_lengths=torch.full_like(lengths, CLIP_TOKENS + llm_tokens) if workload.all_text_visible else lengths,
        target=normal(samples, frames, CHANNELS, rows, columns),
        fps=torch.randint(8, 31, (samples,), generator=generator).float(),
        dropout_seeds=torch.randint(2**62, (samples,), generator=generator) if workload.hidden_dropout else None,
    )


def _single_samples(batch: Batch) -> Iterator[Batch]:
    tensors = {item.name: getattr(batch, item.name) for item in fields(batch)}
    for index in range(len(batch.latents)):
        cut: dict[str, Any] = {
            name: value[index : index + 1] for name, value in tensors.items() if isinstance(value, Tensor)
        }
        yield replace(batch, **cut)


@torch.no_grad()
def _leave_no_zero(chunk: VideoDiT, seed: int) -> None:
    """Add noise to every parameter, the same under every layout: at zero or one, a wrong gradient may look right."""
    tensor_rank, tensor_size = chunk.groups.tp.rank(), chunk.groups.tp.size()
    for name, parameter in chunk.named_parameters():
        shape, dimension = list(parameter.shape), _partition_dim(parameter)
        if dimension >= 0:
            shape[dimension] *= tensor_size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
        if dimension >= 0:
            noise = noise.chunk(tensor_size, dimension)[tensor_rank]
        # Rows of matrices add up many inputs; norms, biases and modulation act one by one.
        is_matrix = parameter.dim() > 1 and not name.endswith("modulation_table")
        parameter.add_(noise.to(parameter) * (0.05 if is_matrix else 0.3))


def _telemetry(result: StepResult) -> dict[str, float]:
    assert result.layer_norms is not None
    named = {
        f"{kind} {part}": value for kind, parts in vars(result.layer_norms).items() for part, value in parts.items()
    }
    losses = mean_by_time(result.loss_sums_by_time, result.positions_by_time)
    return named | {f"loss t={bin_label(index)}": loss for index, loss in enumerate(losses) if loss is not None}


def _gradient(item: MainParameter) -> Tensor:
    """Of the part that this rank updates: the others' has not been reduced."""
    if isinstance(item.main, DTensor):
        assert item.main.grad is not None
        return item.main.grad
    gradient: Tensor = item.parameter.main_grad  # type: ignore[attr-defined]
    return gradient.flatten()[item.part or slice(None)]


def _partition_dim(parameter: Tensor) -> int:
    return int(getattr(parameter, "partition_dim", -1)) if getattr(parameter, "tensor_model_parallel", False) else -1


def _piece(parameter: Tensor, values: Tensor, start: int) -> Piece:
    # A copy first: memory that numpy has seen cannot be given up, as Megatron-FSDP does with gathered weights.
    flat = to_local_if_dtensor(values.detach()).float().flatten().cpu().clone()
    return Piece(flat.numpy(), start, tuple(parameter.shape), _partition_dim(parameter))
