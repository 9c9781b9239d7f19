"""Rotary position embedding over (frame, row, column): each axis turns its own slice of the head (reference 1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10000.0


@dataclass(frozen=True)
class Rope:
    """Rotation of queries and keys for one latent grid.

    `cos` and `sin` are [s, 1, 1, head_dim]; `sin` carries the sign of the half-split rotation.
    """

    cos: Tensor
    sin: Tensor
    split: tuple[int, ...]
    _parts: dict[tuple[int, int, int], Rope] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of_rank(self, padded_tokens: int, rank: int, size: int) -> Rope:
        """The tables of one of `size` ranks that hold `padded_tokens` tokens in contiguous parts; zero at padding."""
        if size == 1 and padded_tokens == len(self.cos):
            return self
        # Backward keeps tables: made once, and no larger than they are, they are the same for all micro-batches.
        key = (padded_tokens, rank, size)
        if key not in self._parts:
            padding = (0, 0, 0, 0, 0, 0, 0, padded_tokens - len(self.cos))
            cos, sin = (F.pad(table, padding).chunk(size)[rank].clone() for table in (self.cos, self.sin))
            self._parts[key] = Rope(cos, sin, self.split)
        return self._parts[key]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate `x` [s, b, heads, head_dim]; pairs are (j, j + width / 2) inside each axis's slice."""
        halves: list[Tensor] = []
        for part in x.split(self.split, dim=-1):
            first, second = part.chunk(2, dim=-1)
            halves += [second, first]
        return x * self.cos + torch.cat(halves, dim=-1) * self.sin


def joined(ropes: Sequence[Rope]) -> Rope:
    """Tables of sequences that lie behind one another."""
    cos, sin = (torch.cat(tables) for tables in zip(*((rope.cos, rope.sin) for rope in ropes), strict=True))
    return Rope(cos, sin, ropes[0].split)


@lru_cache(maxsize=64)
def build_rope(
    grid: tuple[int, int, int], split: tuple[int, ...], dtype: torch.dtype, device: torch.device, round_angles: bool
) -> Rope:
    """Tables for a patched latent grid (T, h, w), cached per grid.

    Angles are fp32; with `round_angles` they are rounded to `dtype` before the cosine is taken (reference H3).
    """
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in grid), indexing="ij")
    cosines, sines = [], []
    for position, width in zip(positions, split, strict=True):
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        angles = position.reshape(-1, 1) * (1.0 / BASE**exponents)
        if round_angles:
            angles = angles.to(dtype)
        cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
        cosines += [cosine, cosine]
        sines += [-sine, sine]
    cos, sin = (torch.cat(parts, dim=-1)[:, None, None, :] for parts in (cosines, sines))
    return Rope(cos, sin, split)
