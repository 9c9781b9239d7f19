"""One optimizer step: forward and backward over the micro-batches, agreement of all ranks, update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_video.flow_matching import squared_errors
from training.data import Batch
from training.layer_norms import LayerNorms, LayerProbe
from training.optimizer import ReadyGradients
from training.packing import PackedBatch, most_positions, packed
from training.phases import Phases
from training.preference_data import PairBatch, pair_loss
from training.stop_signal import STOP_REASONS
from training.time_bins import TIME_BINS, bin_by_time

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class StepResult:
    """What one step did, equal on all ranks."""

    loss: float
    """Mean squared error of the velocity over the global batch; of pairs, the mean preference loss."""
    grad_norm: float
    """Global gradient norm before clipping."""
    refused: bool
    """The loss or the gradient was not finite, and the weights were left alone."""
    stop_reason: str | None
    """Some rank has to stop: the first of STOP_REASONS that applies."""
    loss_sums_by_time: list[float]
    """The loss apart by t, in TIME_BINS equal parts of [0, 1): squared errors of the global batch, ..."""
    positions_by_time: list[int]
    """... and latent positions; of pairs, their number."""
    corrupt_samples: int = 0
    """Samples of the global batch that could not be read and were left out."""
    layer_norms: LayerNorms | None = None
    """Where they were asked for."""
    measures: dict[str, float] = field(default_factory=dict)
    """What the loss reports beside itself: means over the global batch."""
    batch_losses: list[Tensor] = field(default_factory=list)
    """This replica's own, on the last stage, left on the device: sums of the loss of each micro-batch, by t."""


def train_step(
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[Batch],
    stop_flags: Sequence[bool] = (),
    phases: Phases | None = None,
    probe: LayerProbe | None = None,
    corrupt_samples: int = 0,
    pack_positions: int | None = None,
) -> StepResult:
    """Train on this replica's micro-batches of one global batch; with `probe`, on all ranks, measure its layers.

    `corrupt_samples`: of the samples that were left out, those that this rank tells of. `pack_positions`: join
    micro-batches into sequences of at most so many latent positions.
    """
    # Gradients live in the buffers of the data-parallel wrapper, which accumulate over micro-batches.
    phases = phases or Phases(torch.device("cpu"))
    phases.enter("forward_backward")
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if probe is not None:
        probe.start()
    # Gradients come back summed over replicas and divided by the global count.
    by_batch = forward_backward(model, packed(batches, pack_positions))
    sums = by_batch.sum(0)
    phases.enter("agree")
    gradients = ReadyGradients.prepare(optimizer)
    layer_norms = None if probe is None else probe.finish()
    # All ranks learn here what all ranks found, before any weight changes.
    result = _agree(sums, batches[0].measures, gradients.norm, stop_flags, corrupt_samples)
    phases.enter("update")
    if not result.refused:
        gradients.apply()
    return replace(result, layer_norms=layer_norms, batch_losses=list(by_batch[:, 0]))


def forward_backward(
    model: list[DistributedDataParallel], batches: Sequence[Batch | PackedBatch], forward_only: bool = False
) -> Tensor:
    """Run megatron-core's schedule over `batches`; gradients end up reduced and divided by the global count.

    Returns:
        [m, 2 + n, TIME_BINS] fp64: sum of the loss, number of latent positions and sums of the batches' n measures, by
        t, of each of this replica's m micro-batches (of each part where they are packed); m = 0 but on the last stage.
    """
    outputs = run_schedule(
        forward_step,
        model,
        # Every virtual chunk walks through the same micro-batches.
        [iter(batches) for _ in model],
        len(batches),
        max(most_positions(batch) for batch in batches),
        max(1 if isinstance(batch, PackedBatch) else len(batch.latents) for batch in batches),
        forward_only,
    )
    rows = 2 + (0 if isinstance(batches[0], PackedBatch) else len(batches[0].measures))
    # Stages before the last compute no loss.
    if not outputs:
        return torch.zeros(0, rows, TIME_BINS, dtype=torch.float64, device=next(model[0].parameters()).device)
    # fp64: sums of thousands of micro-batches keep their digits.
    return torch.cat([output["sums_and_counts"].view(-1, rows, TIME_BINS) for output in outputs])


def run_schedule(
    step: Callable[..., tuple[Tensor, LossFunction]],
    model: list[DistributedDataParallel],
    iterators: Sequence[Iterator[Any]],
    count: int,
    most_positions: int,
    most_samples: int,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """megatron-core's schedule over `count` micro-batches, which every chunk takes from its own iterator.

    Args:
        step: megatron-core's forward step.
        model: this rank's chunks.
        iterators: one a chunk.
        count: micro-batches.
        most_positions: latent positions of a sample, at most.
        most_samples: of a micro-batch, at most.
        forward_only: no backward pass.

    Returns:
        The reports of the loss function, one a micro-batch; none but on the last stage.
    """
    reports: list[dict[str, Any]] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(iterators) if len(iterators) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=count,
        # Bounds only: micro-batches differ in shape, and pipeline stages send sizes along.
        seq_length=most_positions,
        micro_batch_size=most_samples,
        forward_only=forward_only,
    )
    return reports


def forward_step(batches: Iterator[Batch | PackedBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """megatron-core's forward step: the model's output (hidden states before the last stage) and the loss to apply."""
    batch = next(batches).to(torch.device(next(model.parameters()).device))
    if isinstance(batch, PackedBatch):
        return model(**batch.arguments()), functools.partial(packed_loss, batch.parts)
    if isinstance(batch, PairBatch):
        return predict(batch, model), functools.partial(pair_loss, batch)
    return predict(batch, model), functools.partial(velocity_loss, batch.target, batch.timestep, counted=batch.counted)


def predict(batch: Batch, model: torch.nn.Module) -> Tensor:
    """The model's output for a batch on its device: the velocity, or hidden states before the last stage."""
    conditions: dict[str, Any] = {} if batch.fps is None else {"fps": batch.fps}
    # Every stage gets the conditions; latents are read by the first stage, their shape by all.
    output: Tensor = model(
        batch.latents,
        batch.timestep,
        batch.llm_states,
        batch.clip_states,
        batch.text_lengths,
        dropout_seeds=batch.dropout_seeds,
        **conditions,
    )
    return output


def packed_loss(parts: list[Batch], predictions: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`velocity_loss` of every part: sums and counts of all, and a row of the report for each."""
    losses = [
        velocity_loss(part.target, part.timestep, prediction, part.counted)
        for part, prediction in zip(parts, predictions, strict=True)
    ]
    sums, counts, reports = zip(*losses, strict=True)
    rows = torch.stack([report["sums_and_counts"] for report in reports])
    return torch.stack(sums).sum(), torch.stack(counts).sum(dtype=torch.int32), {"sums_and_counts": rows}


def velocity_loss(
    target: Tensor, timestep: Tensor, prediction: Tensor, counted: bool = True
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Squared error as megatron-core's triple (sum, count, report), in fp32, called on the last stage only.

    The count is that of latent positions, and the sum is of means over channels: megatron-core counts in int32, which
    single elements of a large global batch would overflow.

    Args:
        target: [b, T, C, h, w] fp32.
        timestep: [b] fp32.
        prediction: [b, T, C, h, w].
        counted: False gives zeros, which weigh nothing in loss and gradient.
    """
    samples, channels = target.shape[0], target.shape[2]
    errors = squared_errors(prediction, target) / channels * counted
    positions = target[0, :, 0].numel() * counted
    count = torch.full((), samples * positions, dtype=torch.int32, device=errors.device)
    # Stays on the device; nothing here waits for the GPU.
    return errors.sum(), count, {"sums_and_counts": bin_by_time(timestep, errors.detach(), positions)}


def _agree(
    sums: Tensor, measures: Sequence[str], grad_norm: float, stop_flags: Sequence[bool], corrupt_samples: int
) -> StepResult:
    """Add loss sums and flags over all ranks in one reduction, so that every rank decides alike."""
    flags = [not math.isfinite(grad_norm), *stop_flags, *[False] * (len(STOP_REASONS) - len(stop_flags))]
    # [loss sums by t, counts by t, sums of each measure by t, flags, samples left out]; one collective a step for it.
    shared = torch.zeros(sums.numel() + len(flags) + 1, dtype=torch.float64)
    shared[sums.numel() :] = torch.tensor([*flags, corrupt_samples])
    shared = shared.to(sums.device, non_blocking=True)
    # Tensor- and context-parallel ranks hold the same loss: it is counted once.
    if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0:
        shared[: sums.numel()] = sums.flatten()
    torch.distributed.all_reduce(shared)
    # Beside the gradient norm, the one moment of a step in which the host waits for the device.
    values = shared.tolist()
    by_time = [values[start : start + TIME_BINS] for start in range(0, sums.numel(), TIME_BINS)]
    losses, counts = by_time[0], [int(count) for count in by_time[1]]
    broken, *stops, corrupt = values[sums.numel() :]
    # Not a number where not one sample of the global batch could be read.
    loss = sum(losses) / sum(counts) if any(counts) else math.nan
    refused = broken > 0 or not math.isfinite(loss)
    reason = next((name for name, stop in zip(STOP_REASONS, stops, strict=True) if stop), None)
    means = {name: sum(row) / max(1, sum(counts)) for name, row in zip(measures, by_time[2:], strict=True)}
    return StepResult(loss, grad_norm, refused, reason, losses, counts, int(corrupt), measures=means)
