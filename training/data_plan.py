"""Which samples make step k: a pure function of (data set, seed, k), the same for any number of ranks and workers.

A step is a fixed number of draws. A draw takes a fixed number of samples from one bucket, so that the micro-batches
cut from it have one shape. Where images are drawn for every video (data.images_per_video), draws are of videos, and
images come on top one by one. Inside a bucket, draws go on where the last one ended, through one permutation after
another (an epoch each). Nothing is stored: permutations and the position in every bucket are computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_video.errors import UserError
from training.balance import Dealing, PlannedBatch, cut_evenly, deal_by_cost
from training.balance_cost import Costs
from training.data_config import DataConfig
from training.data_mix import bucket_shares, group_shares, of_kind
from training.data_order import BucketOrder, Interleaving
from training.sample_groups import GroupKey, SampleGroup

# Part of every key: another order of the data needs another number, so that old runs are not silently continued.
_SCHEME = "megatron-video-plan-2"


@dataclass(frozen=True)
class BatchSizes:
    """Samples by bucket."""

    draw: Mapping[str, int]
    """That are drawn together."""
    micro_batch: Mapping[str, int]
    """Of a micro-batch at most; a draw is cut into as few as possible."""
    whole_draws: bool = False
    """Draws cost alike, so that a replica is given whole ones."""


class DataPlan:
    """The order of the data of one run.

    Args:
        groups: the samples in use, by (source, bucket).
        config: batch sizes and shares.
        seed: the run's seed.
        stage: the training stage's name.
        source_weights: share of every source; None draws samples of all sources equally often.
        sizes: of draws and micro-batches, where the configuration leaves them to be computed ("auto").
        costs: by which micro-batches are dealt to replicas; None deals them out in turn.

    Raises:
        UserError: shares or sizes that name other buckets than those in use, or that leave nothing to draw.
    """

    def __init__(
        self,
        groups: Mapping[GroupKey, SampleGroup],
        config: DataConfig,
        seed: int,
        stage: str,
        source_weights: Mapping[str, float] | None = None,
        sizes: BatchSizes | None = None,
        costs: Costs | None = None,
    ) -> None:
        # Sorted by name: independent of the order in which the shards list them.
        self.buckets = sorted({bucket for _, bucket in groups})
        check_bucket_names(self.buckets, config)
        self.draws_per_step = config.global_batch_size // config.samples_per_draw
        self.sizes = sizes or configured_sizes(self.buckets, config)
        self.costs = costs
        self._key = f"{_SCHEME}/{seed}/{stage}"
        self._images_per_video = Fraction(str(config.images_per_video or 0))
        drawn, added = split_images(groups, config)
        shares = group_shares(drawn, source_weights, config.bucket_weights)
        added_shares = group_shares(added, source_weights, config.bucket_weights) if added else {}
        self._orders = {name: _order(groups, {**shares, **added_shares}, name, self._key) for name in self.buckets}
        # Shares count samples, the interleaving counts draws.
        self._drawn = bucket_shares(shares)
        weights = [share / self.sizes.draw[name] for name, share in self._drawn.items()]
        self._draws = Interleaving(weights, f"{self._key}/buckets")
        self._added = bucket_shares(added_shares)
        self._images = Interleaving(list(self._added.values()) or [1.0], f"{self._key}/images")

    def step(self, step: int) -> list[PlannedBatch]:
        """All micro-batches of the global batch of `step`, from 0, cut as one replica would train on them."""
        first = step * self.draws_per_step
        names, before = list(self._drawn), self._draws.counts_before(first)
        choices = self._draws.choices(first, self.draws_per_step)
        batches: list[list[PlannedBatch]] = [[] for _ in choices]
        for choice in np.unique(choices).tolist():
            draws = np.flatnonzero(choices == choice).tolist()
            for draw, cut in zip(draws, self._draws_of(names[choice], before[choice], draws), strict=True):
                batches[draw] = cut
        # In the order of the draws: dealing in turn then gives replicas equal shapes at the same time.
        return [*itertools.chain.from_iterable(batches), *self._added_images(step)]

    def rank_share(self, step: int, rank: int, size: int) -> list[PlannedBatch]:
        """The micro-batches of `step` for data-parallel rank `rank` of `size`."""
        return self.deal(self.step(step), rank, size)

    def deal(self, batches: list[PlannedBatch], rank: int, size: int) -> list[PlannedBatch]:
        """The part of a step's micro-batches that one replica trains on: by cost, or in turn.

        Raises:
            UserError: fewer items than replicas.
        """
        # In turn: with draws of several micro-batches the replicas work on one shape at a time.
        return batches[rank::size] if self.costs is None else self._dealing(batches, size).share(rank)

    def dealing(self, step: int, size: int) -> Dealing:
        """How `step` is shared out by cost over `size` replicas; only for plans with costs."""
        return self._dealing(self.step(step), size)

    def consumed(self, step: int) -> dict[str, int]:
        """Samples drawn from every bucket before `step`."""
        draws = self._draws.counts_before(step * self.draws_per_step)
        images = self._images.counts_before(self._images_before(step))
        consumed = {name: count * self.sizes.draw[name] for name, count in zip(self._drawn, draws, strict=True)}
        return consumed | dict(zip(self._added, images, strict=False))

    def identity(self) -> dict[str, Any]:
        """All that the order of the data depends on besides the data set, as plain values: nothing of the layout."""
        return {
            "scheme": self._key,
            "draws per epoch": {name: order.draws_per_epoch for name, order in self._orders.items()},
            "draws per step": self.draws_per_step,
            "draw sizes": {name: self.sizes.draw[name] for name in self._drawn},
            "draw shares": self._draws.fractions,
            "images per video": str(self._images_per_video),
            "image shares": self._images.fractions,
            "source shares": {name: order.interleaving.fractions for name, order in self._orders.items()},
        }

    def samples_per_step(self) -> float:
        """Mean number of samples of a step."""
        sizes = [self.sizes.draw[name] for name in self._drawn]
        videos = sum(size * share for size, share in zip(sizes, self._draws.fractions, strict=True))
        return self.draws_per_step * videos * float(1 + self._images_per_video)

    def sample_shares(self) -> dict[str, float]:
        """Fraction of all drawn samples that come from each bucket."""
        added = float(self._images_per_video / (1 + self._images_per_video))
        shares = {name: share * (1 - added) for name, share in self._drawn.items()}
        return dict.fromkeys(self.buckets, 0.0) | shares | {n: share * added for n, share in self._added.items()}

    def _dealing(self, batches: list[PlannedBatch], size: int) -> Dealing:
        assert self.costs is not None
        return deal_by_cost(batches, size, self.costs, self.sizes.micro_batch, self.sizes.whole_draws)

    def _added_images(self, step: int) -> list[PlannedBatch]:
        if not self._added:
            return []
        first, last = (self._images.counts_before(self._images_before(at)) for at in (step, step + 1))
        return [
            batch
            for name, low, high in zip(self._added, first, last, strict=True)
            for batch in cut_evenly(name, *self._orders[name].take(low, high - low), self.sizes.micro_batch[name])
        ]

    def _images_before(self, step: int) -> int:
        """Images drawn before `step`: as many as are owed to the videos before it, rounded down."""
        if not self._images_per_video:
            return 0
        draws = self._draws.counts_before(step * self.draws_per_step)
        videos = sum(count * self.sizes.draw[name] for name, count in zip(self._drawn, draws, strict=True))
        # A fraction of whole numbers: exact however long the run is.
        return math.floor(videos * self._images_per_video)

    def _draws_of(self, bucket: str, before: int, draws: list[int]) -> Iterator[list[PlannedBatch]]:
        """Micro-batches of each of the step's `draws` from one bucket, of which `before` were made in earlier steps."""
        size, most = self.sizes.draw[bucket], self.sizes.micro_batch[bucket]
        # All at once: hundreds of draws one by one would cost more than their samples.
        samples, epochs = self._orders[bucket].take(before * size, len(draws) * size)
        for number, draw in enumerate(draws):
            place = slice(number * size, (number + 1) * size)
            yield cut_evenly(bucket, samples[place], epochs[place], most, draw)


def split_images(
    groups: Mapping[GroupKey, SampleGroup], config: DataConfig
) -> tuple[dict[GroupKey, SampleGroup], dict[GroupKey, SampleGroup]]:
    """(groups of the draws, groups of images that come on top of them).

    Raises:
        UserError: images are wanted beside videos, and there are none of the one or the other.
    """
    if config.images_per_video is None:
        return dict(groups), {}
    videos, images = (of_kind(groups, images) for images in (False, True))
    if not videos or not images:
        raise UserError(
            f"data.images_per_video={config.images_per_video} needs buckets of videos and of images (1 frame); in use: "
            f"{sorted({bucket for _, bucket in groups})}"
        )
    return videos, images


def configured_sizes(in_use: list[str], config: DataConfig) -> BatchSizes:
    """Sizes of every bucket as the configuration gives them."""
    sizes = config.bucket_micro_batch_sizes
    assert not isinstance(sizes, str), "automatic sizes are computed by training.run_plan"
    micro_batch = {name: sizes.get(name, config.micro_batch_size) for name in in_use}
    batches_per_draw = config.samples_per_draw // config.micro_batch_size
    return BatchSizes({name: size * batches_per_draw for name, size in micro_batch.items()}, micro_batch)


def check_bucket_names(in_use: list[str], config: DataConfig) -> None:
    """Refuse shares and sizes of buckets that nobody has.

    Raises:
        UserError: naming the field, the buckets in question and those in use.
    """
    known = {*in_use, *(config.buckets or [])}
    for field in ("bucket_weights", "bucket_micro_batch_sizes"):
        value = getattr(config, field)
        unknown = [] if isinstance(value, str) else sorted(set(value) - known)
        if unknown:
            raise UserError(f"data.{field} names {unknown}, buckets in use are {in_use}")
    weights = config.bucket_weights
    missing = [name for name in in_use if weights and name not in weights]
    if missing:
        raise UserError(f"data.bucket_weights has no share for {missing}; give all of {in_use}, 0 to leave one out")
    if weights and not any(weights[name] for name in in_use):
        raise UserError(f"data.bucket_weights={weights} leaves nothing to draw; buckets in use are {in_use}")


def _order(
    groups: Mapping[GroupKey, SampleGroup], shares: Mapping[GroupKey, float], bucket: str, key: str
) -> BucketOrder:
    members = [name for name in sorted(groups) if name[1] == bucket]
    weights = [shares.get(name, 0.0) for name in members]
    # A bucket that is never drawn has an order all the same, of any shares.
    weights = weights if any(weights) else [1.0] * len(members)
    return BucketOrder([(source, groups[source, bucket]) for source, _ in members], weights, f"{key}/{bucket}")
