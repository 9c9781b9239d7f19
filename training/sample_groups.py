"""The samples that one draw may take: those of one source and one bucket, by their place in the group.

A group is computed or read from a mapped file; no list of its samples is ever in memory.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
GroupKey = tuple[str, str]
"""(source, bucket)"""
WEIGHT_UNIT = 1 << 16
"""Weights are whole multiples of 1 / WEIGHT_UNIT, so that sums of a billion of them are exact."""


class SampleGroup(Protocol):
    """Samples of one source and bucket, in a fixed order."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, places: Integers) -> Integers:
        """Global sample numbers, [n], at `places`, [n], all of which lie in range(len(self))."""

    @property
    def total_weight(self) -> int | None:
        """Sum of the samples' weights in units of 1 / WEIGHT_UNIT; None where every sample weighs 1."""

    def locate(self, units: Integers) -> Integers:
        """Places, [n], whose share of the running sum of weights holds `units`, [n], each in range(total_weight).

        Raises:
            ValueError: the samples have no weights.
        """


class ListedGroup:
    """A group given as the list of its sample numbers: for small sets and tests."""

    def __init__(self, samples: Integers, weights: npt.NDArray[np.float64] | None = None) -> None:
        self._samples = np.asarray(samples, dtype=np.int64)
        self._ends = None if weights is None else np.cumsum(weight_units(weights))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, places: Integers) -> Integers:
        """Global sample numbers at `places`."""
        return self._samples[places]

    @property
    def total_weight(self) -> int | None:
        """Sum of the weights in units, or None."""
        return None if self._ends is None else int(self._ends[-1])

    def locate(self, units: Integers) -> Integers:
        """Places that hold `units` of the running sum of weights."""
        if self._ends is None:
            raise ValueError("these samples have no weights")
        return np.searchsorted(self._ends, units, side="right").astype(np.int64)


def weight_units(weights: npt.NDArray[np.float64]) -> Integers:
    """Weights, [n], as whole numbers of 1 / WEIGHT_UNIT; one that is not 0 stays above 0."""
    units = np.rint(weights * WEIGHT_UNIT).astype(np.int64)
    return np.where(weights > 0, np.maximum(units, 1), 0)
