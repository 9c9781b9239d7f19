"""Which samples make step k: a pure function of (data set, seed, k), the same for any number of ranks and workers.

A step is a fixed number of draws. A draw takes a fixed number of samples from one bucket, so that the micro-batches
cut from it have one shape. Inside a bucket, draws go on where the last one ended, through one permutation of the
bucket after another (an epoch each). Nothing is stored: permutations and the position in every bucket are computed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_video.errors import UserError
from training.config import DataConfig

Integers = npt.NDArray[np.int64]

# Part of every key: another order of the data needs another number, so that old runs are not silently continued.
_SCHEME = "megatron-video-plan-1"
_FEISTEL_ROUNDS = 6
# Positions in [0, 1) as 64-bit integers: exact on every machine.
_WORD = 1 << 64
# Multiples of the golden ratio fill an interval more evenly than random numbers do.
_GOLDEN_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch: samples of one bucket, and how often each has been drawn before."""

    bucket: str
    samples: Integers
    """[b] indices in the data set."""
    epochs: Integers
    """[b] from 0."""


class DataPlan:
    """The order of the data of one run.

    Args:
        buckets: indices in the data set of the samples of every bucket in use.
        config: batch sizes and bucket shares.
        seed: the run's seed.
        stage: the training stage's name.

    Raises:
        UserError: bucket shares or sizes that name other buckets than those in use.
    """

    def __init__(self, buckets: Mapping[str, Integers], config: DataConfig, seed: int, stage: str) -> None:
        self.buckets = dict(sorted(buckets.items()))
        _check_bucket_names(list(self.buckets), config)
        self.draws_per_step = config.global_batch_size // config.samples_per_draw
        self.batches_per_draw = config.samples_per_draw // config.micro_batch_size
        sizes = config.bucket_micro_batch_sizes
        self.micro_batch_sizes = {name: sizes.get(name, config.micro_batch_size) for name in self.buckets}
        self.draw_sizes = {name: size * self.batches_per_draw for name, size in self.micro_batch_sizes.items()}
        self._key = f"{_SCHEME}/{seed}/{stage}"
        # By number of samples, every sample is drawn equally often.
        shares = config.bucket_weights or {name: float(len(samples)) for name, samples in self.buckets.items()}
        # Shares count samples, the interleaving counts draws.
        draw_weights = [shares[name] / self.draw_sizes[name] for name in self.buckets]
        self._interleaving = Interleaving(draw_weights, f"{self._key}/buckets")

    def step(self, step: int) -> list[PlannedBatch]:
        """All micro-batches of the global batch of `step`, from 0."""
        first = step * self.draws_per_step
        positions = dict(zip(self.buckets, self._interleaving.counts_before(first), strict=True))
        # Sorted by name in __init__: independent of the order in which the shards list them.
        names = list(self.buckets)
        batches: list[PlannedBatch] = []
        for draw in range(first, first + self.draws_per_step):
            name = names[self._interleaving.choice(draw)]
            batches += self._draw(name, positions[name])
            positions[name] += 1
        return batches

    def rank_share(self, step: int, rank: int, size: int) -> list[PlannedBatch]:
        """The micro-batches of `step` for data-parallel rank `rank` of `size`.

        Micro-batches are dealt out in turn, so that ranks work on equal shapes at the same time where draws allow.
        """
        return self.step(step)[rank::size]

    def consumed(self, step: int) -> dict[str, int]:
        """Samples drawn from every bucket before `step`."""
        draws = self._interleaving.counts_before(step * self.draws_per_step)
        return {name: count * self.draw_sizes[name] for name, count in zip(self.buckets, draws, strict=True)}

    def identity(self) -> dict[str, Any]:
        """All that the order of the data depends on besides the data set, as plain values."""
        return {
            "scheme": self._key,
            "bucket samples": {name: len(samples) for name, samples in self.buckets.items()},
            "draws per step": self.draws_per_step,
            "draw sizes": self.draw_sizes,
            "draw shares": self._interleaving.fractions,
        }

    def samples_per_step(self) -> float:
        """Mean number of samples of a step."""
        sizes = list(self.draw_sizes.values())
        return self.draws_per_step * sum(s * f for s, f in zip(sizes, self._interleaving.fractions, strict=True))

    def sample_shares(self) -> dict[str, float]:
        """Fraction of all drawn samples that come from each bucket."""
        drawn = [f * s for f, s in zip(self._interleaving.fractions, self.draw_sizes.values(), strict=True)]
        return {name: amount / sum(drawn) for name, amount in zip(self.buckets, drawn, strict=True)}

    def _draw(self, bucket: str, position: int) -> list[PlannedBatch]:
        samples, size = self.buckets[bucket], self.draw_sizes[bucket]
        order = np.arange(position * size, (position + 1) * size)
        # A draw may reach over the end of an epoch; its samples then belong to two permutations.
        epochs, places = order // len(samples), order % len(samples)
        drawn = np.empty(size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            permutation = KeyedPermutation(len(samples), f"{self._key}/{bucket}/{epoch}")
            drawn[chosen] = samples[permutation(places[chosen])]
        cuts = range(0, size, self.micro_batch_sizes[bucket])
        step = self.micro_batch_sizes[bucket]
        return [PlannedBatch(bucket, drawn[i : i + step], epochs[i : i + step]) for i in cuts]


class KeyedPermutation:
    """A pseudo-random permutation of range(size) that is computed, not stored: a Feistel network over the next power
    of four, walked until it lands inside."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        # Two halves of equal width; the domain is at most four times the size, so the walk is short.
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: Integers) -> Integers:
        """The elements at `places`, all of which lie in range(size)."""
        values = self._encrypt(places.astype(np.uint64))
        # Walking the cycle of a permutation of the larger domain stays a permutation of the smaller.
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._round_keys:
            # A Feistel round is invertible whatever the mixing function is.
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


class Interleaving:
    """An endless, even sequence of choices with given weights, of which any part is computed without the rest.

    Choice d is the piece of [0, 1) that holds frac(offset + d * golden ratio), in 64-bit integers.
    """

    def __init__(self, weights: list[float], key: str) -> None:
        total = sum(weights)
        self.fractions = [weight / total for weight in weights]
        # The last end is set exactly: rounding must not leave a gap below 1.
        ends = np.cumsum(self.fractions)
        self._ends = [min(int(end * _WORD), _WORD) for end in ends[:-1]] + [_WORD]
        self._offset = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")

    def choice(self, index: int) -> int:
        """The choice made at place `index` of the sequence."""
        value = (self._offset + index * _GOLDEN_STEP) % _WORD
        return next(choice for choice, end in enumerate(self._ends) if value < end)

    def counts_before(self, index: int) -> list[int]:
        """How often each choice was made at the places before `index`."""
        below = [0, *(self._count_below(end, index) for end in self._ends)]
        return [high - low for low, high in itertools.pairwise(below)]

    def _count_below(self, end: int, index: int) -> int:
        # With x = offset + d * step = q * WORD + r:  floor(x / WORD) - floor((x - end) / WORD) is 1 if r < end else 0.
        every = _floor_sum(index, _WORD, _GOLDEN_STEP, self._offset)
        lowered = _floor_sum(index, _WORD, _GOLDEN_STEP, self._offset + _WORD - end)
        return every - lowered + index


def _check_bucket_names(in_use: list[str], config: DataConfig) -> None:
    known = {*in_use, *(config.buckets or [])}
    for field in ("bucket_weights", "bucket_micro_batch_sizes"):
        unknown = sorted(set(getattr(config, field)) - known)
        if unknown:
            raise UserError(f"data.{field} names {unknown}, buckets in use are {in_use}")
    weights = config.bucket_weights
    missing = [name for name in in_use if weights and name not in weights]
    if missing:
        raise UserError(f"data.bucket_weights has no share for {missing}; give all of {in_use}, 0 to leave one out")
    if weights and not any(weights[name] for name in in_use):
        raise UserError(f"data.bucket_weights={weights} leaves nothing to draw; buckets in use are {in_use}")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _floor_sum(count: int, modulus: int, step: int, offset: int) -> int:
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
