"""The picture of the density of t: the curve against the formula, the names of buckets, and the files of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_video.cli import run_command
from megatron_video.time_density import TimeDensity
from training.density_plot import densities_by_tokens, density_curve, main


def test_the_curve_is_the_density() -> None:
    times, values = density_curve(TimeDensity(kind="logit_normal", mean=-0.3, std=0.7))
    expected = np.exp(-((np.log(times / (1 - times)) + 0.3) ** 2) / (2 * 0.49))
    expected /= 0.7 * math.sqrt(2 * math.pi) * times * (1 - times)
    inner = slice(50, -50)
    np.testing.assert_allclose(values[inner], expected[inner], rtol=2e-3)
    shifted_times, shifted = density_curve(TimeDensity(shift=3.0))
    # Of uniform sigma: dp / dt = shift / (shift - (shift - 1) sigma')^2 with sigma' = 1 - t.
    np.testing.assert_allclose(shifted, 3 / (3 - 2 * (1 - shifted_times)) ** 2, rtol=2e-3)


def test_buckets_of_one_density_share_a_curve() -> None:
    tokens = {"17x48x64": 36, "17x64x48": 36, "1x48x48": 9}
    by_resolution = densities_by_tokens(TimeDensity(shift=2.0, shift_base_tokens=9), tokens)
    assert list(by_resolution) == ["1x48x48: 9 tokens, shift 2", "17x48x64, 17x64x48: 36 tokens, shift 4"]
    assert [density.shift for density in by_resolution.values()] == [2.0, 4.0]
    assert list(densities_by_tokens(TimeDensity(shift=2.0), tokens)) == ["shift 2"]


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d.png"
    assert run_command(main, ["--config", "tiny_t2vi_low", "--out", str(out)]) == 0
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    # Curves have colours, the rest is grey.
    assert (picture.max(2) - picture.min(2) > 60).mean() > 0.003
    assert run_command(main, ["--config", "demo", "--out", str(out), "flow.shift_base_tokens=9"]) == 2
    assert "data.buckets is null" in capsys.readouterr().err
