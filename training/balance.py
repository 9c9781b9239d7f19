"""Which micro-batches of a step each replica gets: by cost, so that no replica waits long for another.

Videos go as the micro-batches they were drawn in, the most expensive first, each to the replica with the least so far
(longest processing time first; Graham 1969). Then images go one by one to the replica with the least so far, and are
collated there (arXiv 2502.10248, section 6.2.4). Items of one bucket cost alike, so all of them are placed at once by
filling up to a level, with the result that placing one after the other has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_video.errors import UserError
from training.balance_cost import Costs
from training.data_mix import is_image
from training.sample_groups import Integers

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch: samples of one bucket, and how often each has been drawn before."""

    bucket: str
    samples: Integers
    """[b] indices in the data set."""
    epochs: Integers
    """[b] from 0; of samples with weights: a number that no other draw of the sample has."""


@dataclass(frozen=True)
class _Pile:
    """Items of one bucket that cost alike."""

    bucket: str
    batches: list[PlannedBatch]
    is_image: bool
    counts: Integers
    """[replicas]: videos count micro-batches, images samples."""

    def share(self, rank: int, image_size: int) -> list[PlannedBatch]:
        """Micro-batches of one replica."""
        first = int(self.counts[:rank].sum())
        last = first + int(self.counts[rank])
        if not self.is_image:
            return self.batches[first:last]
        samples = np.concatenate([batch.samples for batch in self.batches])[first:last]
        epochs = np.concatenate([batch.epochs for batch in self.batches])[first:last]
        # Pieces of equal size: a last one of a few samples would use the device badly.
        pieces = math.ceil(len(samples) / image_size)
        cuts = [(last - first) * piece // max(1, pieces) for piece in range(pieces + 1)]
        return [
            PlannedBatch(self.bucket, samples[low:high], epochs[low:high]) for low, high in itertools.pairwise(cuts)
        ]


@dataclass(frozen=True)
class Dealing:
    """One step's micro-batches on replicas."""

    piles: list[_Pile]
    image_sizes: Mapping[str, int]
    loads: Floats
    """[replicas] expected cost of each."""

    def share(self, rank: int) -> list[PlannedBatch]:
        """Micro-batches of one replica, in the order in which they are to be trained on."""
        shares = [(pile.is_image, pile.share(rank, self.image_sizes[pile.bucket])) for pile in self.piles]
        videos = [batch for image, batches in shares if not image for batch in batches]
        images = [batch for image, batches in shares if image for batch in batches]
        # The gather of weights hides behind the first micro-batch and the reduction of gradients behind the last
        # (section 6.2.2): long ones belong there.
        return [*videos[:-1], *images, *videos[-1:]]

    @property
    def micro_batches(self) -> Integers:
        """[replicas] number of micro-batches of each."""
        return sum(
            (-(-pile.counts // self.image_sizes[pile.bucket]) if pile.is_image else pile.counts for pile in self.piles),
            start=np.zeros(len(self.loads), dtype=np.int64),
        )


def deal_by_cost(batches: Sequence[PlannedBatch], size: int, costs: Costs, sizes: Mapping[str, int]) -> Dealing:
    """Share one step's micro-batches out to `size` replicas.

    Args:
        batches: of the global batch, in its order.
        size: replicas.
        costs: of samples and micro-batches.
        sizes: largest micro-batch of every bucket.

    Raises:
        UserError: fewer videos' micro-batches and images than replicas.
    """
    loads = np.zeros(size)
    piles = []
    for bucket, length, members in _alike(batches, costs):
        image = is_image(bucket)
        count = sum(len(batch.samples) for batch in members) if image else len(members)
        # The overhead of a micro-batch is shared by the images in it.
        cost = costs.of(bucket, 1) if not image else costs.sample[bucket] + costs.micro_batch[bucket] / sizes[bucket]
        counts = fill_up(loads, count, cost if image else costs.of(bucket, length))
        taken = -(-counts // sizes[bucket]) if image else counts
        loads = loads + costs.sample[bucket] * counts * (1 if image else length) + costs.micro_batch[bucket] * taken
        piles.append(_Pile(bucket, members, image, counts))
    _check_all_have_work(piles, size)
    return Dealing(piles, sizes, loads)


def loads_in_turn(batches: Sequence[PlannedBatch], size: int, costs: Costs) -> Floats:
    """[replicas] cost of each if micro-batches are dealt out in turn."""
    loads = np.zeros(size)
    np.add.at(loads, np.arange(len(batches)) % size, [costs.of(b.bucket, len(b.samples)) for b in batches])
    return loads


def fill_up(loads: Floats, count: int, cost: float) -> Integers:
    """How many of `count` items of one cost each replica gets if each item goes to the replica with the least load.

    Args:
        loads: [replicas] before.
        count: items.
        cost: of an item, above 0.

    Returns:
        [replicas] numbers of items; they sum to `count`. Of equal loads the first is served first.
    """
    order = np.sort(loads)
    # Load that the lowest n replicas take up until all of them are as high as the next: the level lies below the first
    # that takes more than there is.
    room = np.arange(1, len(order) + 1) * np.append(order[1:], np.inf) - np.cumsum(order)
    lowest = int(np.argmax(room >= count * cost)) + 1
    level = (count * cost + order[:lowest].sum()) / lowest
    # A hair less, so that rounding never gives out more than there is.
    counts = np.maximum(np.floor((level - loads) / cost - 1e-9), 0).astype(np.int64)
    left = count - int(counts.sum())
    counts[np.argsort(loads + counts * cost, kind="stable")[:left]] += 1
    return counts


def _alike(batches: Sequence[PlannedBatch], costs: Costs) -> Iterator[tuple[str, int, list[PlannedBatch]]]:
    """(bucket, samples of a micro-batch, micro-batches) of all that cost alike: videos before images, and of each kind
    the most expensive item first."""
    alike: dict[tuple[bool, str, int], list[PlannedBatch]] = {}
    for batch in batches:
        image = is_image(batch.bucket)
        alike.setdefault((image, batch.bucket, 1 if image else len(batch.samples)), []).append(batch)

    def place(key: tuple[bool, str, int]) -> tuple[bool, float, str]:
        image, bucket, length = key
        return image, -costs.of(bucket, length), bucket

    for key in sorted(alike, key=place):
        yield key[1], key[2], alike[key]


def _check_all_have_work(piles: Sequence[_Pile], size: int) -> None:
    items = sum(int(pile.counts.sum()) for pile in piles)
    if items < size:
        raise UserError(
            f"{size} replicas, and a step with {items} micro-batches of videos and single images: raise "
            "data.global_batch_size, or use fewer replicas"
        )
