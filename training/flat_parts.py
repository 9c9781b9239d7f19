"""A run of a tensor's flattened elements as boxes of the tensor: what a checkpoint can store without a gather."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangular piece of a tensor."""

    offset: tuple[int, ...]
    """Index of its first element."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes that hold the flattened elements [start, stop) of a tensor of `shape`, in their order.

    At most 2 x dimensions - 1 of them: the rest of a row, whole rows, the beginning of a row, and so on inside rows.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.shape))
