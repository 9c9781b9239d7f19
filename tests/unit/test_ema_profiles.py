"""Reconstructed moving averages of made-up trajectories of weights, against the averages computed update by update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from checkpoints_tools.ema_profiles import (
    exponential_profile,
    mix_averages,
    mix_weights,
    power_profile,
)
from megatron_video.errors import UserError

UPDATES = 4000


def trajectory(noise: float) -> np.ndarray:
    """[UPDATES + 1, 60] weights that approach an optimum, with noise around the way, in fp64."""
    steps = np.arange(UPDATES + 1)[:, None]
    way = np.exp(-steps / np.tile([300.0, 1500.0, 9000.0], 20))
    return way + noise * np.random.default_rng(0).standard_normal(way.shape)


def true_average(weights: np.ndarray, decay: float) -> np.ndarray:
    """After every update, by the recursion that training does."""
    averages = weights.copy()
    for step in range(1, len(weights)):
        averages[step] = decay * averages[step - 1] + (1 - decay) * weights[step]
    return averages


def error_of_weights(weights: np.ndarray, decay: float, every: int) -> float:
    updates = np.arange(0, UPDATES + 1, every)
    shares = mix_weights(updates.tolist(), exponential_profile(decay, UPDATES)).shares
    return float(np.linalg.norm(np.array(shares) @ weights[updates] - true_average(weights, decay)[-1]))


def test_the_profile_is_that_of_torchs_own_average() -> None:
    model = torch.nn.Linear(1, 1, bias=False).double()
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    weights = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for weight in weights:
        model.weight.data.fill_(weight)
        averaged.update_parameters(model)  # the first one is the start
    expected = next(averaged.module.parameters()).item()
    assert exponential_profile(0.9, 8) @ weights.numpy() == pytest.approx(expected, abs=1e-14)


def test_checkpoints_after_every_update_give_the_average_exactly() -> None:
    assert error_of_weights(trajectory(noise=1.0), decay=0.99, every=1) < 1e-12


def test_the_error_falls_with_the_square_of_the_distance_on_a_smooth_way() -> None:
    errors = [error_of_weights(trajectory(noise=0.0), 0.998, every) for every in (400, 200, 100, 50)]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert (ratios > 3.5).all(), errors
    second_derivatives = np.abs(np.diff(trajectory(noise=0.0), 2, axis=0))
    bound = 50**2 / 8 * exponential_profile(0.998, UPDATES)[1:-1] @ second_derivatives
    assert errors[-1] < 1.05 * np.linalg.norm(bound)


def test_the_error_falls_with_denser_checkpoints_under_noise() -> None:
    errors = [error_of_weights(trajectory(noise=0.1), 0.998, every) for every in (1000, 200, 40, 8)]
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < errors[0] / 5


def test_what_lies_before_the_first_checkpoint_is_told() -> None:
    mix = mix_weights([1000, 1500, 2000], exponential_profile(0.999, 2000))
    # Before update 1000, of which 0.999^1000 is left, lies all but that update's own share.
    assert mix.before_first == pytest.approx(0.999**1001)
    assert sum(mix.shares) == pytest.approx(1)


def test_the_widest_gap_is_told() -> None:
    mix = mix_weights([0, 100, 900, 1000], exponential_profile(0.999, 1000))
    assert mix.widest_gap == 800
    # Updates 101 to 899.
    assert mix.gap_share == pytest.approx(0.999**101 - 0.999**900)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_power_profiles_have_the_asked_for_width(width: float) -> None:
    profile = power_profile(width, 20_000)
    steps = np.arange(20_001)
    mean = profile @ steps
    deviation = np.sqrt(profile @ (steps - mean) ** 2)
    assert profile.sum() == pytest.approx(1)
    assert deviation / 20_000 == pytest.approx(width, rel=1e-3)


def test_power_profiles_are_what_their_update_rule_gives() -> None:
    width, weights = 0.1, trajectory(noise=1.0)
    # average = (1 - 1/t)^(gamma + 1) * average + the rest * weight; the paper gives gamma = 6.94 for a width of 0.1
    gamma, average = 6.94, weights[0]
    for step in range(1, UPDATES + 1):
        kept = (1 - 1 / step) ** (gamma + 1)
        average = kept * average + (1 - kept) * weights[step]
    assert power_profile(width, UPDATES) @ weights == pytest.approx(average, abs=1e-3)


def test_other_lengths_from_stored_averages() -> None:
    """Post-hoc: averages of 0.998, stored every so often, give averages of other lengths."""
    weights = trajectory(noise=0.3)
    stored = true_average(weights, 0.998)
    for wanted in (exponential_profile(0.999, UPDATES), power_profile(0.1, UPDATES)):
        found = []
        for every in (1000, 500, 250):
            updates = list(range(every, UPDATES + 1, every))
            mix = mix_averages(updates, [0.998] * len(updates), wanted)
            assert sum(mix.shares) == pytest.approx(1)
            error = np.linalg.norm(np.array(mix.shares) @ stored[updates] - wanted @ weights)
            found.append((mix.residual, error))
        residuals, errors = np.array(found).T
        assert (np.diff(residuals) < 0).all()
        assert errors[-1] < errors[0] / 2
        assert residuals[-1] < 0.15


def test_the_stored_average_itself_is_found_again() -> None:
    mix = mix_averages([1000, 2000, 3000], [0.999] * 3, exponential_profile(0.999, 3000))
    assert mix.shares == pytest.approx([0, 0, 1], abs=1e-9)
    assert mix.residual == pytest.approx(0, abs=1e-9)


def test_dense_stored_averages_give_every_profile_exactly() -> None:
    """Differences of averages after neighbouring updates are the weights themselves."""
    updates, wanted = list(range(301)), power_profile(0.1, 300)
    mix = mix_averages(updates, [0.9] * 301, wanted)
    assert mix.residual is not None
    assert mix.residual < 1e-6
    weights = trajectory(noise=1.0)[:301]
    assert np.array(mix.shares) @ true_average(weights, 0.9) == pytest.approx(wanted @ weights, abs=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, 1.5, float("nan")])
def test_decays_that_average_nothing_are_refused(decay: float) -> None:
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        exponential_profile(decay, 10)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_widths_that_no_profile_has_are_refused(width: float) -> None:
    with pytest.raises(UserError, match="relative width"):
        power_profile(width, 10)
