"""Large pictures in slabs of rows: what a layer needs beside its input and output stays small, the result is the same.

Group norms take their statistics over a whole picture and the middle attention sees all of it, so tiles that are
coded on their own give other latents (half the signal was lost on the demo's Video-VAE). Here every layer works on
the whole picture instead, but its padded, normalised and widened copies exist for a few rows at a time. Differences to
the plain computation are those of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of an input from which it is worked on in slabs, and of one slab; 0.25 GiB in bf16.
MAX_SLAB_ELEMENTS = 2**27


class Slab(NamedTuple):
    """Rows [first, last) of a picture, and the rows [top, bottom) that a convolution needs for them."""

    first: int
    last: int
    top: int
    bottom: int

    def with_halo(self, x: Tensor) -> Tensor:
        """The rows of x [..., H, W] that are needed; a view."""
        return x[..., self.top : self.bottom, :]

    def inner(self, part: Tensor, enlarged: int) -> Tensor:
        """The rows of a layer's result for `with_halo` that belong to the slab; a view."""
        return part[..., (self.first - self.top) * enlarged : (self.last - self.top) * enlarged, :]

    def rows(self, x: Tensor, enlarged: int = 1) -> Tensor:
        """The rows of the slab in x [..., H * enlarged, W]; a view."""
        return x[..., self.first * enlarged : self.last * enlarged, :]


def needs_slabs(x: Tensor, enlarged: int = 1) -> bool:
    """Whether x, enlarged to `enlarged` times as many elements, is so large; never while gradients are recorded."""
    return not torch.is_grad_enabled() and x.numel() * enlarged > MAX_SLAB_ELEMENTS


def slabs(x: Tensor, enlarged: int = 1, halo: int = 1, step: int = 1) -> Iterator[Slab]:
    """Slabs of x [..., H, W] from top to bottom, of multiples of `step` rows; a row counts `enlarged` times."""
    height = x.shape[-2]
    rows = max(step, MAX_SLAB_ELEMENTS * height // (x.numel() * enlarged) // step * step)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        yield Slab(first, last, max(0, first - halo), min(height, last + halo))


def in_slabs(layer: Callable[[Tensor], Tensor], x: Tensor, scale: int = 1, enlarged: int = 1) -> Tensor:
    """`layer(x)`, for a layer that reaches at most one row up and down.

    Args:
        layer: maps [B, C, T, H, W] to [B, C', T', scale * H, scale * W]; zero border.
        x: the whole input.
        scale: rows of the result for one row of x.
        enlarged: elements of the layer's largest intermediate result for one of x.
    """
    result: Tensor | None = None
    for slab in slabs(x, enlarged):
        # The rows next to a cut saw a border that is not there; the halo is as wide as that, and is thrown away.
        part = slab.inner(layer(slab.with_halo(x)), scale)
        if result is None:
            shape = (*part.shape[:3], x.shape[3] * scale, part.shape[4])
            result = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=torch.channels_last_3d)
        slab.rows(result, scale).copy_(part)
    assert result is not None
    return result
