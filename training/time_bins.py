"""Loss apart for parts of the path from noise (t=0) to data (t=1): bins of equal width in t.

Sums and counts stay apart until all ranks' are added, so that the figures are those of one process in any layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Fixed, so that the curves of two runs can be laid over each other.
TIME_BINS = 10


def time_bins(timestep: Tensor) -> Tensor:
    """Bin of each t in [0, 1], int64, t = 1 in the last one."""
    return (timestep * TIME_BINS).long().clamp(max=TIME_BINS - 1)


def bin_by_time(timestep: Tensor, errors: Tensor, positions: int) -> Tensor:
    """Sums and counts of the samples of one micro-batch.

    Args:
        timestep: [b].
        errors: [b] loss of each sample, summed over its latent positions.
        positions: latent positions of each sample.

    Returns:
        [2, TIME_BINS] fp64 on the same device: sum of losses, number of positions.
    """
    # Here: `watch` and `report` read the bins' names, and start without torch.
    import torch

    return sums_by_time(
        timestep, torch.stack([errors.double(), torch.full_like(errors, positions, dtype=torch.float64)])
    )


def sums_by_time(timestep: Tensor, values: Tensor) -> Tensor:
    """Sums over the samples of each bin, [r, TIME_BINS] fp64, of r values of each sample, [r, b]; timestep: [b]."""
    import torch

    inside = time_bins(timestep)[:, None] == torch.arange(TIME_BINS, device=timestep.device)
    # Not by a product with 0 and 1, which would carry a NaN into every bin, nor by adding in place, whose order varies.
    return torch.where(inside, values.double()[:, :, None], 0.0).sum(1)


def mean_by_time(sums: list[float], positions: list[int]) -> list[float | None]:
    """Mean loss of each bin; None for a bin without a sample."""
    return [total / count if count else None for total, count in zip(sums, positions, strict=True)]


def bin_label(index: int) -> str:
    """Such as `0.3-0.4`."""
    return f"{index / TIME_BINS:g}-{(index + 1) / TIME_BINS:g}"
