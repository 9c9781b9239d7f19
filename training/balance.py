"""Which micro-batches of a step each replica gets: by cost, so that no replica waits long for another.

Videos go as the micro-batches they were drawn in, the most expensive first, each to the replica with the least so far
(longest processing time first; Graham 1969). Then images go one by one to the replica with the least so far, and are
collated there (arXiv 2502.10248, section 6.2.4). Items of one bucket cost alike, so all of them are placed at once by
filling up to a level, with the result that placing one after the other has.
"""

from __future__ import annotations

import itertools
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
    draw: int = -1
    """Which of the step's draws it was cut from; -1 for images on top of the draws."""


@dataclass(frozen=True)
class _Pile:
    """Items of one bucket that cost alike: micro-batches (or draws of several) of videos, or single images."""

    bucket: str
    items: list[list[PlannedBatch]]
    is_image: bool
    counts: Integers
    """[replicas] items of each."""

    def share(self, rank: int, image_size: int) -> list[PlannedBatch]:
        """Micro-batches of one replica."""
        first = int(self.counts[:rank].sum())
        last = first + int(self.counts[rank])
        if not self.is_image:
            return [batch for item in self.items[first:last] for batch in item]
        batches = [batch for item in self.items for batch in item]
        samples = np.concatenate([batch.samples for batch in batches])[first:last]
        epochs = np.concatenate([batch.epochs for batch in batches])[first:last]
        return cut_evenly(self.bucket, samples, epochs, image_size)

    def cost(self, costs: Costs, image_size: int) -> Floats:
        """[replicas] cost of what each gets."""
        samples = self.counts * (1 if self.is_image else sum(len(batch.samples) for batch in self.items[0]))
        return costs.sample[self.bucket] * samples + costs.micro_batch[self.bucket] * self.micro_batches(image_size)

    def micro_batches(self, image_size: int) -> Integers:
        """[replicas] micro-batches of each."""
        return -(-self.counts // image_size) if self.is_image else self.counts * len(self.items[0])


@dataclass(frozen=True)
class Dealing:
    """One step's micro-batches on replicas."""

    piles: list[_Pile]
    image_sizes: Mapping[str, int]
    costs: Costs
    """By which it was made."""

    @property
    def loads(self) -> Floats:
        """[replicas] expected cost of each."""
        return self.loads_by(self.costs)

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
        return np.sum([pile.micro_batches(self.image_sizes[pile.bucket]) for pile in self.piles], axis=0)

    def loads_by(self, costs: Costs) -> Floats:
        """[replicas] cost of each by other costs than it was dealt by."""
        return np.sum([pile.cost(costs, self.image_sizes[pile.bucket]) for pile in self.piles], axis=0)


def deal_by_cost(
    batches: Sequence[PlannedBatch], size: int, costs: Costs, sizes: Mapping[str, int], whole_draws: bool = False
) -> Dealing:
    """Share one step's micro-batches out to `size` replicas.

    Args:
        batches: of the global batch, in its order.
        size: replicas.
        costs: of samples and micro-batches.
        sizes: largest micro-batch of every bucket.
        whole_draws: give all micro-batches of a draw of videos to one replica: draws that were made to cost alike.

    Raises:
        UserError: fewer items than replicas.
    """
    units = costs.in_units()
    loads = np.zeros(size)
    piles = []
    for bucket, image, items in _alike(batches, units, whole_draws):
        if image:
            count = sum(len(batch.samples) for item in items for batch in item)
            # The overhead of a micro-batch is shared by the images in it.
            cost = units.sample[bucket] + units.micro_batch[bucket] // sizes[bucket]
        else:
            count, cost = len(items), _cost(items[0], units)
        piles.append(_Pile(bucket, items, image, fill_up(loads, count, cost)))
        loads = loads + piles[-1].cost(units, sizes[bucket])
    _check_all_have_work(piles, size)
    return Dealing(piles, sizes, costs)


def cut_evenly(bucket: str, samples: Integers, epochs: Integers, most: int, draw: int = -1) -> list[PlannedBatch]:
    """Micro-batches of at most `most` samples, of sizes that differ by one at most: a last one of a few samples would
    use the device badly."""
    pieces = -(-len(samples) // most)
    cuts = [len(samples) * piece // max(1, pieces) for piece in range(pieces + 1)]
    return [PlannedBatch(bucket, samples[low:high], epochs[low:high], draw) for low, high in itertools.pairwise(cuts)]


def samples_by_bucket(batches: Sequence[PlannedBatch]) -> dict[str, Integers]:
    """All samples of each bucket, [n], in their order."""
    found: dict[str, list[Integers]] = {}
    for batch in batches:
        found.setdefault(batch.bucket, []).append(batch.samples)
    return {bucket: np.concatenate(samples) for bucket, samples in found.items()}


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


def _alike(
    batches: Sequence[PlannedBatch], costs: Costs, whole_draws: bool
) -> Iterator[tuple[str, bool, list[list[PlannedBatch]]]]:
    """(bucket, whether of images, items) of all that cost alike: videos before images, and of each kind the most
    expensive item first."""
    alike: dict[tuple[bool, float, str], list[list[PlannedBatch]]] = {}
    numbered = enumerate(batches)
    for _, members in itertools.groupby(numbered, lambda at: (at[1].bucket, at[1].draw) if whole_draws else at[0]):
        item = [batch for _, batch in members]
        bucket = item[0].bucket
        image = is_image(bucket)
        key = (image, -(costs.sample[bucket] if image else _cost(item, costs)), bucket)
        alike.setdefault(key, []).append(item)
    for key in sorted(alike):
        yield key[2], key[0], alike[key]


def _cost(item: Sequence[PlannedBatch], costs: Costs) -> float:
    return costs.of(item[0].bucket, sum(len(batch.samples) for batch in item), len(item))


def _check_all_have_work(piles: Sequence[_Pile], size: int) -> None:
    items = sum(int(pile.counts.sum()) for pile in piles)
    if items < size:
        raise UserError(
            f"{size} replicas, and a step with {items} micro-batches of videos and single images: raise "
            "data.global_batch_size, or use fewer replicas"
        )
