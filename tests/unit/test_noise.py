"""NoiseSource is a pure function of its arguments and gives the distributions it names."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_video.flow_matching import TimeDensity
from megatron_video.noise import NoiseSource

SHAPE = (3, 4, 5)
UNIFORM = TimeDensity()


@pytest.mark.parametrize(
    "other",
    [
        lambda: NoiseSource(8, "t2i").noise(2, 5, SHAPE),
        lambda: NoiseSource(7, "t2vi").noise(2, 5, SHAPE),
        lambda: NoiseSource(7, "t2i").noise(3, 5, SHAPE),
        lambda: NoiseSource(7, "t2i").noise(2, 6, SHAPE),
        lambda: NoiseSource(7, "t2i").posterior(2, 5, SHAPE),
    ],
    ids=["seed", "stage", "epoch", "sample", "purpose"],
)
def test_each_part_of_the_key_changes_the_noise(other: Callable[[], torch.Tensor]) -> None:
    base = NoiseSource(7, "t2i").noise(2, 5, SHAPE)
    assert (base - other()).abs().min() > 0


def test_fields_of_the_key_do_not_run_together() -> None:
    assert not torch.equal(NoiseSource(1, "1").noise(11, 1, SHAPE), NoiseSource(1, "1").noise(1, 11, SHAPE))
    assert not torch.equal(NoiseSource(1, 'a",2').noise(0, 0, SHAPE), NoiseSource(1, "a").noise(2, 0, SHAPE))


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), sample=st.integers(0, 10**12))
@settings(max_examples=30, deadline=None)
def test_equal_on_repeat_and_independent_of_everything_else(seed: int, epoch: int, sample: int) -> None:
    first = NoiseSource(seed, "stage")
    expected = first.noise(epoch, sample, SHAPE), first.timestep(epoch, sample, UNIFORM)
    # Default generators in any state, and calls in another order.
    torch.manual_seed(seed % 1000)
    np.random.seed(seed % 1000)
    random.seed(seed)
    before = torch.get_rng_state()
    second = NoiseSource(seed, "stage")
    second.posterior(epoch, sample, (7,))
    time = second.timestep(np.int64(epoch), np.int64(sample), UNIFORM)
    second.noise(epoch, sample + 1, SHAPE)
    assert torch.equal(second.noise(epoch, sample, SHAPE), expected[0])
    assert time == expected[1]
    assert torch.equal(before, torch.get_rng_state())


def test_values_of_this_scheme_do_not_change() -> None:
    """A run resumed with a newer version of this package or of numpy must see the noise it would have seen."""
    source = NoiseSource(7, "demo")
    assert source.noise(0, 3, (4,)).tolist() == pytest.approx([1.9002, -0.4738, -0.4098, 1.7586], abs=1e-4)
    assert source.timestep(0, 3, UNIFORM) == pytest.approx(0.24005926, abs=1e-7)
    assert source.posterior(0, 3, (2,)).tolist() == pytest.approx([0.4144, 1.8890], abs=1e-4)


def test_noise_is_standard_normal() -> None:
    noise = torch.stack([NoiseSource(0, "s").noise(0, i, (400,)) for i in range(500)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.numel())
    within_one = (noise.abs() < 1).float().mean()
    assert abs(within_one - math.erf(1 / math.sqrt(2))) < 0.005
    # Samples are independent of each other: mean products of neighbours vanish.
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / math.sqrt(noise[1:].numel())


def test_uniform_times_and_text_dropout_have_their_rates() -> None:
    source, count = NoiseSource(3, "s"), 4000
    times = np.array([source.timestep(1, i, UNIFORM) for i in range(count)])
    histogram = np.histogram(times, bins=10, range=(0, 1))[0]
    assert histogram.sum() == count
    assert ((histogram - count / 10) ** 2 / (count / 10)).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    dropped = np.array([source.drop_text(1, i, 0.1) for i in range(count)])
    assert abs(dropped.mean() - 0.1) < 4 * math.sqrt(0.09 / count)
    assert abs(np.corrcoef(times, dropped)[0, 1]) < 4 / math.sqrt(count)
    assert not source.drop_text(0, 0, 0.0)
    assert source.drop_text(0, 0, 1.0)


def test_an_image_video_pair_of_one_index_differs_by_shape_only_in_length() -> None:
    """Noise fills the shape in order, so one sample's noise does not depend on how the shape is split."""
    source = NoiseSource(0, "s")
    assert torch.equal(source.noise(0, 0, (2, 3)).flatten(), source.noise(0, 0, (6,)))


@pytest.mark.parametrize(("epoch", "sample"), [(-1, 0), (0, -1)])
def test_negative_positions_are_refused(epoch: int, sample: int) -> None:
    with pytest.raises(ValueError, match="count from 0"):
        NoiseSource(0, "s").noise(epoch, sample, SHAPE)
