"""Figures of tensors against numpy in fp64, in one block and in many, and with values that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from checkpoints_tools import tensor_stats
from checkpoints_tools.tensor_stats import compare, measure


@pytest.fixture(params=[7, 1 << 22], ids=["many blocks", "one block"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_stats, "_BLOCK", request.param)


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((12, 25), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_figures_are_those_of_numpy(dtype: torch.dtype) -> None:
    tensor = numbers(0, dtype)
    # A mean far from zero, where a difference of sums would lose the deviation; and some zeros.
    tensor = tensor + 1000 if dtype == torch.float32 else tensor
    tensor[0, :5] = 0
    truth, found = tensor.double().numpy(), measure(tensor)
    assert found.norm == pytest.approx(np.linalg.norm(truth), rel=1e-12)
    assert found.mean == pytest.approx(truth.mean(), rel=1e-11)
    assert found.std == pytest.approx(truth.std(), rel=1e-11)
    assert (found.min, found.max, found.zeros) == (truth.min(), truth.max(), np.mean(truth == 0))
    assert (found.nan, found.inf) == (0, 0)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    tensor = torch.tensor([3.0, math.nan, -math.inf, 4.0, math.inf, 0.0, 0.0, 0.0])
    found = measure(tensor)
    assert (found.nan, found.inf) == (1, 2)
    assert (found.norm, found.min, found.max, found.zeros) == (5.0, 0.0, 4.0, 3 / 8)
    assert measure(torch.tensor([math.nan])).norm is None
    assert measure(torch.empty(0, 4)).mean is None


def test_differences_are_those_of_numpy() -> None:
    first, second = numbers(0), numbers(0)
    second[3, 4:9] += 0.25
    x, y, found = first.double().numpy(), second.double().numpy(), compare(first, second)
    assert (found.values, found.differing) == (300, 5)
    assert found.max_abs == np.abs(x - y).max()
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert found.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulps_count_representable_numbers(dtype: torch.dtype) -> None:
    first = torch.tensor([1.0, -1.0, 2.0], dtype=dtype)
    above = torch.nextafter(torch.nextafter(first, torch.tensor(9.0, dtype=dtype)), torch.tensor(9.0, dtype=dtype))
    assert compare(first, above).max_ulp == 2
    smallest = torch.nextafter(torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype))
    assert compare(smallest, -smallest).max_ulp == 2
    assert compare(first, above.double()).max_ulp is None


def test_nan_equals_nan_and_is_infinitely_far_from_a_number() -> None:
    first, second = torch.tensor([math.nan, 1.0, math.inf]), torch.tensor([math.nan, 1.0, math.inf])
    assert compare(first, second).differing == 0
    signs = compare(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (signs.differing, signs.max_abs, signs.relative, signs.max_ulp) == (1, 0.0, 0.0, 0)
    broken = compare(torch.tensor([1.0, 2.0]), torch.tensor([math.nan, 2.0]))
    assert (broken.differing, broken.max_abs, broken.relative) == (1, math.inf, math.inf)


def test_tensors_of_zeros_have_no_angle() -> None:
    found = compare(torch.zeros(3), torch.tensor([0.0, 3.0, 4.0]))
    assert (found.relative, found.cosine, found.max_abs) == (1.0, None, 4.0)
    assert compare(torch.empty(0), torch.empty(0)).differing == 0
