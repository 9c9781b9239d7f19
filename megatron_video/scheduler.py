"""The times at which the sampler evaluates the model (Step-Video-T2V's FlowMatchDiscreteScheduler)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.flow_matching import shift_time


def sigmas(num_steps: int, time_shift: float, reverse: bool = False) -> Tensor:
    """The `num_steps + 1` times of an Euler run, equidistant before the shift.

    Args:
        num_steps: Euler steps.
        time_shift: how much denser the steps lie near noise; 1 is equidistant. The paper uses 13 (30 to 50 steps).
        reverse: give 1 - t instead, which falls from 1 (noise) to 0 (data).

    Returns:
        [num_steps + 1] fp32, from 0 (noise) to 1 (data) unless `reverse`.

    Raises:
        UserError: no steps, or a shift that is not a positive number.
    """
    if num_steps < 1:
        raise UserError(f"steps={num_steps}: at least 1 is needed")
    if not (math.isfinite(time_shift) and time_shift > 0):
        raise UserError(f"time shift={time_shift} must be a number above 0; 1 means equidistant steps")
    # fp64 until the end: with a large shift the first times lie close together.
    times = [shift_time(step / num_steps, time_shift) for step in range(num_steps + 1)]
    values = torch.tensor(times, dtype=torch.float64)
    return (1 - values if reverse else values).float()
