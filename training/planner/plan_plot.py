"""A picture of plans: where the time of a step goes and where the memory, layout by layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.planner.cluster import GIB
from training.planner.plan import Plan, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 12


def draw_plans(plans: Sequence[Plan], path: Path) -> None:
    """Bars of the fastest layouts: seconds by part, hidden ones left out, and GiB by part with the limit."""
    from matplotlib.figure import Figure

    shown = plans[:_SHOWN]
    names = [f"{describe(plan.parallel)}\nMFU {plan.mfu_percent:.2f} %" for plan in shown]
    figure = Figure(figsize=(14, 2.2 + 0.55 * len(shown)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    _bars(time, names, [{k: v for k, v in p.seconds.by_part().items() if not k.startswith("hidden")} for p in shown])
    time.set(title="a step", xlabel="s")
    _bars(memory, names, [plan.peak.in_gib() for plan in shown])
    memory.axvline(shown[0].job.cluster.usable_bytes / GIB, color="black", linestyle="--", label="usable")
    memory.set(title="fullest GPU", xlabel="GiB")
    for panel in (time, memory):
        # Below the axes: the bars leave no corner free.
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncol=5)
        panel.grid(axis="x", alpha=0.3)
    time.invert_yaxis()
    figure.savefig(path, dpi=110)


def _bars(panel: Axes, names: Sequence[str], plans: Sequence[Mapping[str, float]]) -> None:
    left = [0.0] * len(plans)
    for part in plans[0]:
        widths: list[Any] = [plan[part] for plan in plans]
        if not any(widths):
            continue
        panel.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    panel.tick_params(axis="y", labelsize=7)
