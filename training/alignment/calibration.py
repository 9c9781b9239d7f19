"""Whether a reward model means what it says: how often it is right where it claims a probability.

A pair in which the model prefers one member with probability p = sigmoid(|difference of rewards|) is right in a share p
of the cases, if the model is calibrated. The expected calibration error is the mean distance of the two over bins of p,
weighted by their pairs (Naeini et al., 2015; Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_video.files import appearing
from training.proportions import wilson_interval

_BINS = 5


@dataclass(frozen=True)
class Bin:
    """Pairs in which the model is about equally sure."""

    pairs: int
    claimed: float
    """Mean probability that its preference is right."""
    right: int
    """Pairs in which it is."""


@dataclass(frozen=True)
class Calibration:
    """Of a model on pairs."""

    bins: list[Bin]

    @property
    def expected_error(self) -> float:
        """Mean distance of what is claimed from what is right."""
        distances = [abs(part.claimed * part.pairs - part.right) for part in self.bins]
        return sum(distances) / sum(part.pairs for part in self.bins)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {"expected_error": self.expected_error, "bins": [asdict(part) for part in self.bins]}


def calibration(margins: Tensor) -> Calibration:
    """From the rewards of winners less those of losers, [n]; empty bins are left out."""
    claimed = torch.sigmoid(margins.double().abs())
    numbers = ((claimed - 0.5) * 2 * _BINS).long().clamp_max(_BINS - 1)
    members = (numbers == number for number in range(_BINS))
    return Calibration(
        [
            Bin(int(inside.sum()), float(claimed[inside].mean()), int((margins[inside] > 0).sum()))
            for inside in members
            if inside.any()
        ]
    )


def draw_reliability(found: Calibration, path: Path) -> None:
    """Write the reliability diagram as PNG: share right against probability claimed, with 95 % intervals."""
    # Here: who only scores does without matplotlib.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    claimed = [part.claimed for part in found.bins]
    shares = [part.right / part.pairs for part in found.bins]
    intervals = [wilson_interval(part.right, part.pairs) for part in found.bins]
    # Rounding may put a bound of 0 or 1 on the other side.
    below = [max(0.0, share - low) for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, intervals, strict=True)]
    axes.errorbar(claimed, shares, yerr=[below, above], fmt="o-", capsize=3, label="held-out pairs, 95 % interval")
    for part, share in zip(found.bins, shares, strict=True):
        axes.annotate(str(part.pairs), (part.claimed, share), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.set(
        title=f"expected calibration error {found.expected_error:.1%}",
        xlabel="probability claimed, sigmoid(|margin|)",
        ylabel="share right (numbers: pairs)",
        xlim=(0.48, 1.02),
        ylim=(0, 1.05),
    )
    axes.legend(loc="lower right", fontsize=8)
    with appearing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
