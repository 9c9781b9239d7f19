"""adaLN-single: one projection of the time embedding, shared by all blocks, plus a small table per block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """How one residual branch is conditioned: shift and scale before it, gate after it, each [1, b, D].

    Kept un-repeated: the tokens' axis is broadcast, so backward saves [b, D] and not [s, b, D] (paper 6.2.3).
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor


def block_modulations(table: Tensor, shared: Tensor) -> tuple[Modulation, Modulation]:
    """The (attention, feed-forward) modulations of one block.

    Args:
        table: the block's own [6, D], in the order shift, scale, gate of attention, then of the feed-forward.
        shared: the projected time embedding [b, 6, D].
    """
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (table + shared).transpose(0, 1).unsqueeze(1)
    return Modulation(shift_a, scale_a, gate_a), Modulation(shift_f, scale_f, gate_f)
