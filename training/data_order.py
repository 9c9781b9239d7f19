"""Endless orders that are computed and not stored: any part of one costs the same, however far it is from the start."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from training.sample_groups import WEIGHT_UNIT, Integers, SampleGroup

_FEISTEL_ROUNDS = 6
# Positions in [0, 1) as 64-bit integers: exact on every machine.
_WORD = 1 << 64
# Multiples of the golden ratio fill an interval more evenly than random numbers do.
_GOLDEN_STEP = 0x9E3779B97F4A7C15


class KeyedPermutation:
    """A pseudo-random permutation of range(size): a Feistel network over the next power of two, walked until it lands
    inside."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        # The two parts swap places in every round; an even number of rounds gives each its own width back.
        self._low, self._high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: Integers) -> Integers:
        """The elements at `places`, all of which lie in range(size)."""
        values = self._encrypt(places.astype(np.uint64))
        # Walking the cycle of a permutation of the larger domain stays a permutation of the smaller.
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            walked = self._encrypt(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.size]
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left_bits, right_bits = self._high, self._low
        left, right = values >> right_bits, values & _mask(right_bits)
        for key in self._round_keys:
            # A Feistel round is invertible whatever the mixing function is.
            left, right = right, left ^ (_mix(right ^ key) & _mask(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


class Interleaving:
    """An endless, even sequence of choices with given weights, of which any part is computed without the rest.

    Choice d is the piece of [0, 1) that holds frac(offset + d * golden ratio), in 64-bit integers.
    """

    def __init__(self, weights: Sequence[float], key: str) -> None:
        total = sum(weights)
        self.fractions = [weight / total for weight in weights]
        # The last end is set exactly: rounding must not leave a gap below 1.
        ends = list(itertools.accumulate(self.fractions))
        self._ends = [min(int(end * _WORD), _WORD) for end in ends[:-1]] + [_WORD]
        # A choice that ends where the interval does leaves nothing to those behind it.
        self._cuts = np.array([min(end, _WORD - 1) for end in self._ends[:-1]], dtype=np.uint64)
        self._offset = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")

    def choices(self, first: int, count: int) -> Integers:
        """The choices made at the places from `first` on, [count]."""
        start = np.uint64((self._offset + first * _GOLDEN_STEP) % _WORD)
        values = start + np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN_STEP)  # modulo 2^64, as meant
        return np.searchsorted(self._cuts, values, side="right").astype(np.int64)

    def counts_before(self, index: int) -> list[int]:
        """How often each choice was made at the places before `index`."""
        below = [0, *(self._count_below(end, index) for end in self._ends)]
        return [high - low for low, high in itertools.pairwise(below)]

    def _count_below(self, end: int, index: int) -> int:
        # With x = offset + d * step = q * WORD + r:  floor(x / WORD) - floor((x - end) / WORD) is 1 if r < end else 0.
        if end == _WORD:
            return index
        every = floor_sum(index, _WORD, _GOLDEN_STEP, self._offset)
        lowered = floor_sum(index, _WORD, _GOLDEN_STEP, self._offset + _WORD - end)
        return every - lowered + index


class GroupOrder:
    """The order in which the samples of one group are drawn: one permutation after another, an epoch each.

    A sample of weight w is drawn floor(w) or ceil(w) times in an epoch, w times on average: the epoch's draws lie
    evenly on the running sum of weights, from another start in every epoch (systematic sampling; Madow 1949).
    """

    def __init__(self, group: SampleGroup, key: str) -> None:
        self._group, self._key = group, key
        total = group.total_weight
        self.draws_per_epoch = len(group) if total is None else max(1, round(total / WEIGHT_UNIT))

    def take(self, places: Integers) -> tuple[Integers, Integers]:
        """Samples, [n], at `places` of the order, ascending, and a number for each, [n], that no other draw of the same
        sample has: how often it was drawn before, or, with weights, the place itself."""
        epochs, within = np.divmod(places, self.draws_per_epoch)
        samples = np.empty(len(places), dtype=np.int64)
        numbers = epochs.copy()
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen], numbers[chosen] = self._of_epoch(int(epoch), within[chosen])
        return samples, numbers

    def _of_epoch(self, epoch: int, within: Integers) -> tuple[Integers, Integers | int]:
        key, size = f"{self._key}/{epoch}", self.draws_per_epoch
        drawn = KeyedPermutation(size, key)(within)
        total = self._group.total_weight
        if total is None:
            return self._group[drawn], epoch
        # floor(drawn * total / size) without its product, which would not fit into 64 bits.
        whole, rest = divmod(total, size)
        units = drawn * whole + drawn * rest // size
        start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % max(1, whole)
        return self._group[self._group.locate(units + start)], epoch * size + drawn


class BucketOrder:
    """The order in which the samples of one bucket are drawn from its groups (one for each source)."""

    def __init__(self, groups: Sequence[tuple[str, SampleGroup]], shares: Sequence[float], key: str) -> None:
        self._orders = [GroupOrder(group, f"{key}/{source}") for source, group in groups]
        self.interleaving = Interleaving(shares, f"{key}/sources")

    def take(self, first: int, count: int) -> tuple[Integers, Integers]:
        """`count` samples from place `first` on, and their numbers, as GroupOrder.take gives them."""
        if count == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        if len(self._orders) == 1:
            return self._orders[0].take(np.arange(first, first + count))
        choices, before = self.interleaving.choices(first, count), self.interleaving.counts_before(first)
        samples, numbers = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for choice in np.unique(choices):
            chosen = choices == choice
            places = np.arange(before[choice], before[choice] + np.count_nonzero(chosen))
            samples[chosen], numbers[chosen] = self._orders[choice].take(places)
        return samples, numbers

    @property
    def draws_per_epoch(self) -> list[int]:
        """Draws until every sample of a group had its turn, by group."""
        return [order.draws_per_epoch for order in self._orders]


def floor_sum(count: int, modulus: int, step: int, offset: int) -> int:
    """Sum of floor((step * i + offset) / modulus) for i in range(count), in O(log modulus) as in Euclid's algorithm."""
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (step // modulus) + count * (offset // modulus)
        step, offset = step % modulus, offset % modulus
        last = step * count + offset
        if last < modulus:
            break
        count, offset = divmod(last, modulus)
        step, modulus = modulus, step
    return total


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
