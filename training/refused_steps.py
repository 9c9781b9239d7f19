"""Which samples made a step whose loss or gradient was not finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from training.data import StepData
from training.data_set import TrainingData
from training.train_step import StepResult

# An event is one line; a global batch can have thousands of micro-batches.
MAX_NAMED_BATCHES = 64


def name_batches(step: StepData, result: StepResult, data: TrainingData) -> list[dict[str, Any]]:
    """The micro-batches whose loss was not finite, or all if only the gradient was; a collective of all ranks.

    Called after a refused step alone, which all ranks know of, so its cost does not matter.

    Returns:
        On all ranks, for at most MAX_NAMED_BATCHES: replica, micro_batch, bucket, samples (file and key of each).
    """
    own = _own_batches(step, result)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    batches = [batch for part in everyone for batch in part]
    broken = [batch for batch in batches if not batch["finite"]] or batches
    return [
        {
            "replica": batch["replica"],
            "micro_batch": batch["micro_batch"],
            "bucket": batch["bucket"],
            "samples": [data.where(sample) for sample in batch["samples"]],
        }
        for batch in broken[:MAX_NAMED_BATCHES]
    ]


def _own_batches(step: StepData, result: StepResult) -> list[dict[str, Any]]:
    """This replica's micro-batches, from the one of its ranks that sees the losses first."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0
    if not first or not result.batch_losses:
        return []
    # One wait for the device, for all of them.
    finite = torch.stack([losses.sum() for losses in result.batch_losses]).isfinite().tolist()
    return [
        {
            "replica": parallel_state.get_data_parallel_rank(),
            "micro_batch": number,
            "bucket": planned.bucket,
            "samples": [int(sample) for sample in planned.samples],
            "finite": is_finite,
        }
        for number, (planned, is_finite) in enumerate(zip(step.planned, finite, strict=True))
    ]
