"""Direction, density of t, and the loss, against their equations."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from megatron_video.flow_matching import TimeDensity, interpolate, shift_time, squared_errors, velocity


def test_path_starts_at_noise_and_ends_at_data() -> None:
    noise, data = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(interpolate(noise, data, torch.zeros(2)), noise)
    assert torch.equal(interpolate(noise, data, torch.ones(2)), data)


def test_velocity_is_the_derivative_of_the_path() -> None:
    noise, data = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    time = torch.tensor([0.2, 0.7], dtype=torch.float32)
    step = 0.25
    difference = interpolate(noise, data, time + step) - interpolate(noise, data, time)
    assert torch.allclose(difference / step, velocity(noise, data), atol=2e-6)


def test_each_sample_has_its_own_time_in_fp32() -> None:
    noise, data = torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)
    mixed = interpolate(noise, data, torch.tensor([0.123456, 0.654321]))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[:, 0], torch.tensor([0.123456, 0.654321]))


def test_squared_errors_are_sums_of_each_sample() -> None:
    prediction, target = torch.randn(3, 5, 2, dtype=torch.bfloat16), torch.randn(3, 5, 2)
    errors = squared_errors(prediction, target)
    assert errors.dtype == torch.float32
    expected = torch.nn.functional.mse_loss(prediction.float(), target, reduction="none")
    assert torch.allclose(errors, expected.sum((1, 2)))
    with pytest.raises(ValueError, match="differ in shape"):
        squared_errors(prediction, target[:1])


def test_shift_moves_time_towards_noise() -> None:
    assert shift_time(0.0, 13.0) == 0.0
    assert shift_time(1.0, 13.0) == 1.0
    assert shift_time(0.5, 3.0) == pytest.approx(1 - 0.75)
    assert shift_time(0.3, 1.0) == pytest.approx(0.3)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.7, 1.4, 1.0), (0.3, 0.5, 3.0)])
def test_logit_normal_quantiles_match_its_distribution_function(mean: float, std: float, shift: float) -> None:
    density = TimeDensity(kind="logit_normal", mean=mean, std=std, shift=shift)
    for probability in (0.01, 0.2, 0.5, 0.8, 0.99):
        time = density.quantile(probability)
        # Undo the shift: with s' = a s / (1 + (a-1) s), s = s' / (a - (a-1) s').
        remaining = (1 - time) / (shift - (shift - 1) * (1 - time))
        logit = math.log((1 - remaining) / remaining)
        assert NormalDist(mean, std).cdf(logit) == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_stay_in_the_half_open_interval_and_in_fp32(kind: str) -> None:
    density = build_config(TimeDensity, {"kind": kind, "std": 30.0, "shift": 0.001}, origin="test")
    for probability in (0.0, 1e-300, 0.5, 1 - 2**-53):
        time = density.quantile(probability)
        assert 0 <= time < 1
        assert time == float(np.float32(time))


def test_bad_densities_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="std=0"):
        build_config(TimeDensity, {"std": 0.0}, origin="test")
    with pytest.raises(UserError, match="kind='cosine'"):
        build_config(TimeDensity, {"kind": "cosine"}, origin="test")
