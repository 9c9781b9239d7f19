"""Several samples behind one another in one sequence, each with its own time, modulation, text and positions.

The sequence has batch size 1, and padding at its end. What mixes tokens (attention) runs for every sample alone, so no
mask is made and nothing is computed that a mask would hide; what acts on single tokens runs for all of them at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """Tokens `first` to `end` - 1 of some part of the sequence, all of one sample."""

    sample: int
    first: int
    end: int


@dataclass(frozen=True)
class Packing:
    """Where the samples of a sequence are."""

    video: tuple[int, ...]
    """Video tokens of every sample."""
    text: tuple[int, ...]
    """Text tokens of every sample, none of them hidden."""
    held: tuple[Cut, ...]
    """This rank's video tokens, under sequence parallelism of its own part; padding goes with the last sample."""
    gathered: tuple[Cut, ...]
    """The same of all of this context-parallel rank's tokens, as attention sees them."""


def cuts(lengths: Sequence[int], first: int, count: int) -> tuple[Cut, ...]:
    """Samples of so many tokens each, within `count` tokens from `first` on; what is behind the last goes with it."""
    ends = list(itertools.accumulate(lengths))
    starts = [0, *ends[:-1]]
    # Padding is computed on like tokens, and then thrown away; it needs some sample's modulation.
    ends[-1] = max(ends[-1], first + count)
    places = [(max(start, first), min(end, first + count)) for start, end in zip(starts, ends, strict=True)]
    return tuple(Cut(sample, low - first, high - first) for sample, (low, high) in enumerate(places) if low < high)


def by_sample(
    function: Callable[..., Tensor], tokens: Sequence[Tensor], modulations: Sequence[Tensor], pieces: Sequence[Cut]
) -> Tensor:
    """`function(*tokens, *modulations)` of every sample's tokens [s, 1, ...] with its own of the modulations [1, n, D].

    Modulations stay un-repeated for backward, as they are for samples that are not packed.
    """
    # A loop, not a gather of modulations by token: that would repeat them for every token in what backward keeps.
    done = [
        function(
            *(tensor[piece.first : piece.end] for tensor in tokens),
            *(modulation[:, piece.sample : piece.sample + 1] for modulation in modulations),
        )
        for piece in pieces
    ]
    return torch.cat(done)


def within_samples(attend: Callable[[Tensor, Tensor, Tensor], Tensor], lengths: Sequence[int]) -> Callable[..., Tensor]:
    """Attention that every sample pays to itself alone, over sequences without padding."""

    def attend_within(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        samples = zip(*(tensor.split(list(lengths)) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(*sample) for sample in samples])

    return attend_within
