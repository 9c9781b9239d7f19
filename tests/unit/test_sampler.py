"""Euler sampling against closed-form solutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.sampler import sample_latents
from megatron_video.scheduler import sigmas


@pytest.mark.parametrize(("steps", "shift"), [(1, 13.0), (7, 1.0), (50, 13.0), (10, 2.5)])
def test_times_rise_from_noise_to_data_and_reverse_mirrors(steps: int, shift: float) -> None:
    times = sigmas(steps, shift)
    assert times.dtype == torch.float32
    assert times.shape == (steps + 1,)
    assert times[0] == 0
    assert times[-1] == 1
    assert (times.diff() > 0).all()
    assert torch.allclose(sigmas(steps, shift, reverse=True), 1 - times, atol=1e-7)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (5, 0.0), (5, -1.0), (5, math.nan), (5, math.inf)])
def test_impossible_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(UserError):
        sigmas(steps, shift)


def test_straight_velocity_arrives_at_the_data_exactly() -> None:
    noise, data = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    result = sample_latents(lambda x, t: data - noise, noise, sigmas(9, 13.0), 1.0)
    assert torch.allclose(result, data, atol=1e-5)


def test_euler_converges_to_the_exponential() -> None:
    noise = torch.randn(1, 8)
    coarse, fine = (sample_latents(lambda x, t: x, noise, sigmas(n, 1.0), 1.0) for n in (50, 100))
    exact = noise * math.e
    assert (fine - exact).abs().max() < 0.55 * (coarse - exact).abs().max()  # first order
    assert torch.allclose(fine, noise * (1 + 1 / 100) ** 100, rtol=1e-4)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 9.0])
def test_guidance_combines_prompt_and_negative_rows(scale: float) -> None:
    calls: list[int] = []
    positive, negative = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [0.5]])

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.shape[0])
        assert t.shape == (x.shape[0],)
        assert t.dtype == torch.float32
        return torch.cat([positive, negative])[: x.shape[0]]

    result = sample_latents(velocity_fn, torch.zeros(2, 1), sigmas(4, 3.0), scale)
    assert torch.allclose(result, negative + scale * (positive - negative), atol=1e-6)
    assert set(calls) == ({2} if scale == 1.0 else {4})


def test_state_stays_fp32_and_initial_rounding_is_a_choice() -> None:
    noise = torch.randn(1, 16)
    zero = sample_latents(lambda x, t: torch.zeros_like(x, dtype=torch.bfloat16), noise, sigmas(2, 1.0), 1.0)
    assert zero.dtype == torch.float32
    assert torch.equal(zero, noise)
    rounded = sample_latents(torch.mul, noise, torch.zeros(2), 1.0, round_initial_to_bf16=True)
    assert torch.equal(rounded, noise.bfloat16().float())


def test_progress_is_reported_and_nan_guidance_refused() -> None:
    steps: list[int] = []
    sample_latents(lambda x, t: x, torch.zeros(1, 1), sigmas(3, 1.0), 2.0, on_step=steps.append)
    assert steps == [1, 2, 3]
    with pytest.raises(UserError, match="guidance"):
        sample_latents(lambda x, t: x, torch.zeros(1, 1), sigmas(3, 1.0), math.nan)
