"""The densities of t against their published formulas: quantiles, histograms, and the shift by resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from megatron_video.noise import NoiseSource
from megatron_video.time_density import TimeDensity, shift_time

Floats = npt.NDArray[np.float64]
DRAWS = 4000
# Of the largest distance between the distribution functions of so many draws and of their law: one in 10^5 is larger.
LARGEST_DISTANCE = 2.5 / math.sqrt(DRAWS)
GRID = (np.arange(200_000) + 0.5) / 200_000


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


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode", "u_shaped"])
def test_times_stay_in_the_half_open_interval_and_in_fp32(kind: str) -> None:
    density = build_config(
        TimeDensity, {"kind": kind, "std": 30.0, "u_sharpness": 300.0, "shift": 0.001}, origin="test"
    )
    for probability in (0.0, 1e-300, 0.5, 1 - 2**-53):
        time = density.quantile(probability)
        assert 0 <= time < 1
        assert time == float(np.float32(time))


def logit_normal(time: Floats) -> Floats:
    """Density of arXiv 2403.03206, eq. 19, with m=-0.4 and s=0.8."""
    logit = np.log(time / (1 - time))
    return np.exp(-((logit + 0.4) ** 2) / (2 * 0.64)) / (0.8 * math.sqrt(2 * math.pi) * time * (1 - time))


def mode(scale: float) -> Callable[[Floats], Floats]:
    """Density of the times that f_mode of the same paper makes of uniform u, in its own sigma, as 1 / f'."""

    def density(time: Floats) -> Floats:
        places = np.linspace(0, 1, 400_001)
        sigma = 1 - places - scale * (np.cos(np.pi / 2 * places) ** 2 - 1 + places)
        return np.interp(time, 1 - sigma[:-1], np.diff(places) / -np.diff(sigma))

    return density


def u_shaped(time: Floats) -> Floats:
    return np.exp(5 * time) + np.exp(5 * (1 - time))


LAWS = [
    pytest.param({"kind": "uniform"}, np.ones_like, id="uniform"),
    pytest.param({"kind": "logit_normal", "mean": -0.4, "std": 0.8}, logit_normal, id="logit_normal"),
    pytest.param({"kind": "mode", "mode_scale": 1.29}, mode(1.29), id="mode"),
    pytest.param({"kind": "mode", "mode_scale": -0.8}, mode(-0.8), id="mode of the ends"),
    pytest.param({"kind": "u_shaped"}, u_shaped, id="u_shaped"),
]


def distribution(values: dict[str, object], density: Callable[[Floats], Floats]) -> Callable[[float], float]:
    """The distribution function, integrated from the density; a shift is undone first."""
    cumulative = np.cumsum(density(GRID))
    shift = float(values.get("shift", 1.0))  # type: ignore[arg-type]

    def below(time: float) -> float:
        return float(np.interp(shift_time(time, 1 / shift), GRID, cumulative / cumulative[-1]))

    return below


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("values", "density"), LAWS)
def test_draws_follow_the_density(values: dict[str, object], density: Callable[[Floats], Floats], shift: float) -> None:
    values = {**values, "shift": shift}
    law, source = build_config(TimeDensity, values, origin="test"), NoiseSource(0, "test")
    draws = np.sort([source.timestep(0, sample, law) for sample in range(DRAWS)])
    below = distribution(values, density)
    laws = np.array([below(time) for time in draws])
    steps = np.arange(DRAWS + 1) / DRAWS
    distance = max(np.abs(laws - steps[:-1]).max(), np.abs(laws - steps[1:]).max())
    assert distance < LARGEST_DISTANCE


@pytest.mark.parametrize(("values", "density"), LAWS)
def test_quantiles_invert_the_distribution_function(
    values: dict[str, object], density: Callable[[Floats], Floats]
) -> None:
    law, below = build_config(TimeDensity, values, origin="test"), distribution(values, density)
    quantiles = [law.quantile(p) for p in (0.001, 0.1, 0.37, 0.5, 0.75, 0.999)]
    assert [below(time) for time in quantiles] == pytest.approx([0.001, 0.1, 0.37, 0.5, 0.75, 0.999], abs=2e-5)
    many = [law.quantile(p) for p in np.linspace(0, 1, 2001)[:-1]]
    assert many == sorted(many)


def test_values_of_the_closed_forms() -> None:
    # u + s (u - sin^2(pi u / 2)) at u = 1/3: sin^2(pi / 6) = 1/4.
    assert TimeDensity(kind="mode", mode_scale=0.9).quantile(1 / 3) == pytest.approx(1 / 3 + 0.9 / 12, abs=1e-7)
    assert TimeDensity(kind="mode", mode_scale=0.0).quantile(0.3) == pytest.approx(0.3, abs=1e-7)
    # F(t) = (e^at - e^a(1-t) + e^a - 1) / (2 (e^a - 1))
    sharp, time = 5.0, 0.2
    share = (math.exp(sharp * time) - math.exp(sharp * (1 - time)) + math.exp(sharp) - 1) / (2 * math.expm1(sharp))
    assert TimeDensity(kind="u_shaped").quantile(share) == pytest.approx(time, abs=1e-7)
    assert TimeDensity(kind="logit_normal", mean=0.3).quantile(0.5) == pytest.approx(1 / (1 + math.exp(-0.3)), abs=1e-7)


def test_shift_grows_with_the_root_of_the_tokens() -> None:
    density = TimeDensity(shift=3.0, shift_base_tokens=2880)
    assert density.for_tokens(2880).quantile(0.5) == TimeDensity(shift=3.0).quantile(0.5)
    assert density.for_tokens(4 * 2880) == TimeDensity(shift=6.0)
    # arXiv 2403.03206, eq. 23: with n and m pixels, sigma_m = r sigma_n / (1 + (r - 1) sigma_n), r = sqrt(m / n).
    sigma, ratio = 1 - TimeDensity().quantile(0.3), math.sqrt(720 / 180)
    expected = ratio * sigma / (1 + (ratio - 1) * sigma)
    by_resolution = TimeDensity(shift_base_tokens=180).for_tokens(720)
    assert 1 - by_resolution.quantile(0.3) == pytest.approx(expected, abs=1e-7)
    assert TimeDensity(shift=3.0).for_tokens(99) == TimeDensity(shift=3.0)


def test_a_shift_by_resolution_needs_the_resolution() -> None:
    with pytest.raises(ValueError, match="for_tokens"):
        TimeDensity(shift_base_tokens=256).quantile(0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"std": 0.0}, "std=0"),
        ({"kind": "cosine"}, "kind='cosine'"),
        ({"mode_scale": 1.8}, "mode_scale=1.8 must lie between -1 and 1.7519"),
        ({"u_sharpness": 0}, "u_sharpness=0"),
        ({"shift_base_tokens": 0}, "shift_base_tokens=0"),
    ],
)
def test_bad_densities_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(TimeDensity, values, origin="test")
