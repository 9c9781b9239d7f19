"""A picture of preference pairs: where winners and losers lie, how far apart, how many a prompt has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_video.files import appearing

if TYPE_CHECKING:
    from training.alignment.pair import Pair, Rules

_BINS = 24


def draw_pairs(pairs: Sequence[Pair], scores: Mapping[int, float], rules: Rules, path: Path) -> None:
    """Write the picture as PNG."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    members = {"winners": [scores[pair.winner.index] for pair in pairs]}
    members["losers"] = [scores[pair.loser.index] for pair in pairs]
    everything = [*members["winners"], *members["losers"]]
    edges = [min(everything) + (max(everything) - min(everything)) * number / _BINS for number in range(_BINS + 1)]
    for name, values in members.items():
        left.hist(values, bins=edges if edges[0] < edges[-1] else _BINS, alpha=0.6, label=name)
    left.set(title="scores", xlabel="score", ylabel="samples")
    left.legend()
    middle.hist([pair.margin for pair in pairs], bins=_BINS, color="tab:green")
    middle.axvline(rules.margin, color="black", linestyle="--", linewidth=1, label="--margin")
    middle.set(title="margins", xlabel="score of the winner less the loser's", ylabel="pairs")
    middle.legend()
    by_count = Counter(Counter(pair.winner.prompt for pair in pairs).values())
    right.bar(list(by_count), list(by_count.values()), color="tab:purple")
    right.set(title="balance over prompts", xlabel="pairs of a prompt", ylabel="prompts", xticks=sorted(by_count))
    with appearing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
