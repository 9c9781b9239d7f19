"""Direction and loss, against their equations."""

from __future__ import annotations

import pytest
import torch

from megatron_video.flow_matching import interpolate, squared_errors, velocity


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
