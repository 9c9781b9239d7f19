"""Loss apart by t: every sample in its bin, and the bins together are the whole."""

from __future__ import annotations

import math

import pytest
import torch

from training.time_bins import TIME_BINS, bin_by_time, bin_label, mean_by_time, time_bins


def test_bins_are_tenths_of_the_path() -> None:
    times = torch.tensor([0.0, 0.0999, 0.1001, 0.55, 0.99999994, 1.0])
    assert time_bins(times).tolist() == [0, 0, 1, 5, 9, 9]
    assert [bin_label(0), bin_label(9)] == ["0-0.1", "0.9-1"]


def test_sums_and_counts_of_every_bin() -> None:
    times, errors = torch.tensor([0.05, 0.95, 0.08, 0.42]), torch.tensor([1.0, 10.0, 3.0, 7.0])
    sums, counts = bin_by_time(times, errors, 6)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [4.0, 0, 0, 0, 7.0, 0, 0, 0, 0, 10.0]
    assert counts.tolist() == [12, 0, 0, 0, 6, 0, 0, 0, 0, 6]
    means = mean_by_time(sums.tolist(), [int(count) for count in counts])
    assert means[0] == pytest.approx(4 / 12)
    assert means[1] is None


def test_a_nan_stays_in_its_bin() -> None:
    sums, _ = bin_by_time(torch.tensor([0.35, 0.95]), torch.tensor([float("nan"), 2.0]), 1)
    assert [index for index in range(TIME_BINS) if math.isnan(sums[index])] == [3]
    assert sums[9] == 2.0
