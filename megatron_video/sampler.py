"""Euler integration from noise to data with classifier-free guidance; the state stays fp32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_video.errors import UserError

VelocityFunction = Callable[[Tensor, Tensor], Tensor]


def uses_negative(guidance_scale: float) -> bool:
    """Whether the rows of the negative prompt are evaluated at all: at scale 1 they would cancel out.

    Raises:
        UserError: the scale is not a finite number.
    """
    if not math.isfinite(guidance_scale):
        raise UserError(f"guidance={guidance_scale} must be a finite number; 1 means no guidance")
    return guidance_scale != 1.0


def guide(positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """v = v_negative + scale * (v_positive - v_negative), fp32: scale 0 is the negative, 1 the prompt alone."""
    negative = negative.float()
    return negative + guidance_scale * (positive.float() - negative)


def euler_step(state: Tensor, velocity: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """x + v * (t' - t) in fp32."""
    return state + velocity.float() * (next_time - time).to(state.device)


@torch.no_grad()
def sample_latents(
    velocity_fn: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    guidance_scale: float,
    *,
    round_initial_to_bf16: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate dx/dt = v(x, t) over the times `sigmas`.

    Args:
        velocity_fn: (x [rows, ...] fp32, t [rows] fp32) -> velocity [rows, ...]. With guidance there are 2b rows,
            [prompt 0..b-1, negative 0..b-1]; without it (scale 1) only the b prompt rows.
        noise: [b, ...] standard normal, on the device to compute on.
        sigmas: [N + 1] rising times, as `scheduler.sigmas` gives them.
        guidance_scale: see `guide`.
        round_initial_to_bf16: round the noise to bf16 once, as the released pipeline does.
        on_step: called with the number of finished steps.

    Returns:
        [b, ...] fp32 latents.

    Raises:
        UserError: a guidance scale that is not finite.
    """
    guided = uses_negative(guidance_scale)
    state = noise.to(torch.bfloat16).float() if round_initial_to_bf16 else noise.float()
    for step, (time, next_time) in enumerate(itertools.pairwise(sigmas)):
        # One call of 2b rows rather than two of b: the weights are read once.
        rows = torch.cat([state, state]) if guided else state
        # Time is never cast to the model's dtype here: bf16 would move it by up to 2 of 1000 steps.
        times = time.to(device=state.device, dtype=torch.float32).expand(rows.shape[0])
        velocity = velocity_fn(rows, times)
        if guided:
            positive, negative = velocity.chunk(2)
            velocity = guide(positive, negative, guidance_scale)
        state = euler_step(state, velocity, time, next_time)
        if on_step is not None:
            on_step(step + 1)
    return state
