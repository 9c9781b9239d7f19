"""One optimizer step: forward and backward over the micro-batches, agreement of all ranks, update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_video.flow_matching import squared_error
from training.data import Batch
from training.optimizer import ReadyGradients

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepResult:
    """What one step did, equal on all ranks."""

    loss: float
    """Mean squared error of the velocity over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    refused: bool
    """The loss or the gradient was not finite, and the weights were left alone."""
    stop_requested: bool
    """Some rank was told to stop."""


def train_step(
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[Batch],
    stop_requested: bool = False,
) -> StepResult:
    """Train on this replica's micro-batches of one global batch."""
    # Gradients live in the buffers of the data-parallel wrapper, which accumulate over micro-batches.
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    # Gradients come back summed over replicas and divided by the global count.
    sum_and_count = forward_backward(model, batches)
    gradients = ReadyGradients.prepare(optimizer)
    # All ranks learn here what all ranks found, before any weight changes.
    result = _agree(sum_and_count, gradients.norm, stop_requested)
    if not result.refused:
        gradients.apply()
    return result


def forward_backward(model: list[DistributedDataParallel], batches: list[Batch], forward_only: bool = False) -> Tensor:
    """Run megatron-core's schedule over `batches`; gradients end up reduced and divided by the global count.

    Returns:
        [2] fp64: sum of the loss and number of latent positions of this replica; zeros but on the last stage.
    """
    device = next(model[0].parameters()).device
    # Every virtual chunk walks through the same micro-batches.
    iterators = [iter(batches) for _ in model]
    outputs: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batches),
        # Bounds only: micro-batches differ in shape, and pipeline stages send sizes along.
        seq_length=max(batch.latents[0, :, 0].numel() for batch in batches),
        micro_batch_size=max(len(batch.latents) for batch in batches),
        forward_only=forward_only,
    )
    # Stages before the last compute no loss.
    if not outputs:
        return torch.zeros(2, dtype=torch.float64, device=device)
    # fp64: sums of thousands of micro-batches keep their digits.
    return torch.stack([output["sum_and_count"] for output in outputs]).sum(0)


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """megatron-core's forward step: the model's output (hidden states before the last stage) and the loss to apply."""
    batch = next(batches).to(torch.device(next(model.parameters()).device))
    conditions: dict[str, Any] = {} if batch.fps is None else {"fps": batch.fps}
    # Every stage gets the conditions; latents are read by the first stage, their shape by all.
    output = model(
        batch.latents,
        batch.timestep,
        batch.llm_states,
        batch.clip_states,
        batch.text_lengths,
        dropout_seeds=batch.dropout_seeds,
        **conditions,
    )
    return output, functools.partial(velocity_loss, batch.target)


def velocity_loss(target: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Squared error as megatron-core's triple (sum, count, report), in fp32, called on the last stage only.

    The count is that of latent positions, and the sum is of means over channels: megatron-core counts in int32, which
    single elements of a large global batch would overflow.

    Args:
        target: [b, T, C, h, w] fp32.
        prediction: [b, T, C, h, w].
    """
    total, elements = squared_error(prediction, target)
    channels = target.shape[2]
    total, positions = total / channels, elements // channels
    # Stays on the device; nothing here waits for the GPU.
    report = torch.stack([total.detach().double(), positions.double()])
    return total, positions.int(), {"sum_and_count": report}


def _agree(sum_and_count: Tensor, grad_norm: float, stop_requested: bool) -> StepResult:
    """Add loss sums and flags over all ranks in one reduction, so that every rank decides alike."""
    # [loss sum, count, non-finite flags, stop flags]; one collective a step for all of it.
    shared = torch.zeros(4, dtype=torch.float64, device=sum_and_count.device)
    # Tensor- and context-parallel ranks hold the same loss: it is counted once.
    if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0:
        shared[:2] = sum_and_count
    shared[2] = not math.isfinite(grad_norm)
    shared[3] = stop_requested
    torch.distributed.all_reduce(shared)
    # Beside the gradient norm, the one moment of a step in which the host waits for the device.
    loss_sum, count, broken, stop = shared.tolist()
    loss = loss_sum / count
    return StepResult(loss, grad_norm, refused=broken > 0 or not math.isfinite(loss), stop_requested=stop > 0)
