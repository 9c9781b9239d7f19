"""The plot of training/simulate_balance.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from training.simulate_balance import Outcome

matplotlib.use("Agg")
_COLOURS = ("#b2182b", "#ef8a62", "#2166ac", "#999999", "#1b7837", "#762a83")


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """A row a stage: every replica's cost in one step, and max / mean against the images that there are to place."""
    from matplotlib import pyplot

    stages = list(dict.fromkeys(outcome.stage for outcome in outcomes))
    figure, panels = pyplot.subplots(len(stages), 2, figsize=(13, 5 * len(stages)), squeeze=False)
    for row, stage in zip(panels, stages, strict=True):
        ours = [outcome for outcome in outcomes if outcome.stage == stage]
        _replicas(row[0], ours)
        _ratios(row[1], ours)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _replicas(panel: Any, outcomes: Sequence[Outcome]) -> None:
    # The paper speaks of images beside videos; 1:1 where it was simulated.
    ratio = min({outcome.images_per_video for outcome in outcomes}, key=lambda ratio: abs(ratio - 1))
    chosen = [outcome for outcome in outcomes if outcome.images_per_video == ratio]
    for outcome, colour in zip(chosen, itertools.cycle(_COLOURS)):
        label = f"{outcome.scenario}: max / mean {outcome.max_over_mean:.3f}"
        panel.plot(range(1, len(outcome.loads) + 1), outcome.loads, color=colour, label=label, linewidth=1.6)
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set_title(f"{chosen[0].stage}: first step, {ratio:g} images per video")
    panel.set_xlabel("replica, by cost")
    panel.set_ylabel("cost / mean of replicas")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, loc="upper left")


def _ratios(panel: Any, outcomes: Sequence[Outcome]) -> None:
    names = list(dict.fromkeys(outcome.scenario for outcome in outcomes))
    for name, colour in zip(names, itertools.cycle(_COLOURS)):
        rows = [outcome for outcome in outcomes if outcome.scenario == name]
        panel.plot(
            [outcome.images_per_video for outcome in rows],
            [outcome.max_over_mean - 1 for outcome in rows],
            marker="o",
            color=colour,
            label=name,
        )
    panel.axhline(0.03, color="black", linestyle="--", linewidth=0.8, label="1.03")
    panel.set_yscale("log")
    panel.set_title(f"{outcomes[0].stage}: time lost to the slowest replica")
    panel.set_xlabel("images per video")
    panel.set_ylabel("max / mean - 1, mean over steps")
    # Below the axes: the lines leave no corner free.
    panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
