"""The samples that one draw may take: those of one source and one bucket, by their place in the group.

A group is computed or read from a mapped file; no list of its samples is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_video.shard_index import WEIGHT_UNIT as WEIGHT_UNIT
from megatron_video.shard_index import weight_units

Integers = npt.NDArray[np.int64]
GroupKey = tuple[str, str]
"""(source, bucket)"""


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


class Part(NamedTuple):
    """A group, and what its numbers have to be raised by."""

    group: SampleGroup
    first: int


class ChainedGroup:
    """Groups one after the other.

    Args:
        parts: the groups.
        weighted: whether the samples' weights count; a part without any has 1 for every sample.
    """

    def __init__(self, parts: Sequence[Part], weighted: bool = True) -> None:
        self._parts = [part for part in parts if len(part.group)]
        self._ends = np.array([0, *accumulate(len(part.group) for part in self._parts)])
        totals = [part.group.total_weight for part in self._parts]
        self._units: Integers | None = None
        if weighted and any(total is not None for total in totals):
            alike = [len(part.group) * WEIGHT_UNIT for part in self._parts]
            known = [other if total is None else total for total, other in zip(totals, alike, strict=True)]
            self._units = np.array([0, *accumulate(known)])

    def __len__(self) -> int:
        """Number of samples."""
        return int(self._ends[-1])

    def __getitem__(self, places: Integers) -> Integers:
        """Global sample numbers at `places`."""
        places, found = np.asarray(places, dtype=np.int64), np.empty(len(places), dtype=np.int64)
        inside = np.searchsorted(self._ends, places, side="right") - 1
        for number in np.unique(inside):
            part, chosen = self._parts[number], inside == number
            found[chosen] = part.group[places[chosen] - self._ends[number]] + part.first
        return found

    @property
    def total_weight(self) -> int | None:
        """Sum of the weights in units, or None."""
        return None if self._units is None else int(self._units[-1])

    def locate(self, units: Integers) -> Integers:
        """Places that hold `units` of the running sum of weights."""
        if self._units is None:
            raise ValueError("these samples have no weights")
        places = np.empty(len(units), dtype=np.int64)
        inside = np.searchsorted(self._units, units, side="right") - 1
        for number in np.unique(inside):
            chosen, group = inside == number, self._parts[number].group
            rest = units[chosen] - self._units[number]
            own = group.locate(rest) if group.total_weight is not None else rest // WEIGHT_UNIT
            places[chosen] = own + self._ends[number]
        return places
