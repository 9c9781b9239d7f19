"""What balance found, as a table of clusters and plots that one can look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from data_prep.balance_steps import Balanced, BalanceSettings
from megatron_video.shard_schema import write_atomically

SIZES_PLOT, SIMILARITY_PLOT = "cluster_sizes.png", "similarity.png"
_BINS = 100
_FEW = 50


def write_balance_report(
    folder: Path, balanced: Balanced, settings: BalanceSettings, figures: Mapping[str, Any]
) -> None:
    """clusters.parquet (a row a cluster), report.json, and the two plots."""
    folder.mkdir(parents=True, exist_ok=True)
    table = cluster_table(balanced)
    pq.write_table(table, folder / "clusters.parquet")
    content = {"settings": asdict(settings), "figures": dict(figures)}
    write_atomically(folder / "report.json", json.dumps(content, indent=1).encode())
    _save(_sizes_figure(table), folder / SIZES_PLOT)
    _save(_similarity_figure(balanced, settings), folder / SIMILARITY_PLOT)


def cluster_table(balanced: Balanced) -> pa.Table:
    """A row a cluster: clips before and after, what was removed, the weight of a clip and of the whole cluster."""
    total = len(balanced.cluster_count)
    kept = balanced.kept

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(balanced.cluster[chosen], minlength=total)

    mass = np.bincount(balanced.cluster[kept], weights=balanced.weight[kept], minlength=total)
    clips = count(kept)
    return pa.table(
        {
            "cluster": np.arange(total),
            "before": balanced.cluster_count,
            "outliers": count(balanced.outlier),
            "duplicates": count(balanced.keeper >= 0),
            "after": clips,
            "weight_of_a_clip": np.divide(mass, clips, out=np.zeros(total), where=clips > 0),
            "weight_of_the_cluster": mass,
        }
    )


def _sizes_figure(table: pa.Table) -> Figure:
    figure, axes = _figure(1)
    for name, label in (
        ("before", "clips before"),
        ("after", "clips kept"),
        ("weight_of_the_cluster", "expected draws an epoch (sum of weights)"),
    ):
        values = np.sort(table[name].to_numpy())[::-1]
        axes[0].plot(np.arange(1, len(values) + 1), values, marker="." if len(values) < _FEW else None, label=label)
    axes[0].set(xscale="log", yscale="log", xlabel="clusters, the largest first", ylabel="clips in the cluster")
    _plain_numbers(axes[0].xaxis, axes[0].yaxis)
    axes[0].set_title("Cluster sizes")
    axes[0].legend()
    return figure


def _similarity_figure(balanced: Balanced, settings: BalanceSettings) -> Figure:
    figure, axes = _figure(2)
    has = balanced.cluster >= 0
    values = balanced.center_similarity
    _histogram(axes[0], {"kept or duplicate": values[has & ~balanced.outlier], "outlier": values[balanced.outlier]})
    axes[0].set(xlabel="cosine with the cluster's centre (Center_Sim)", title="Distance from the centre")
    compared = balanced.nearest > -1
    duplicate = compared & (balanced.nearest >= settings.duplicate_similarity)
    near = balanced.nearest
    _histogram(axes[1], {"kept": near[compared & ~duplicate], "near-duplicate": near[duplicate]})
    axes[1].set(xlabel="cosine with the nearest better clip of its cluster", title="Near-duplicates by embedding")
    if settings.duplicate_similarity <= 1:
        axes[1].axvline(settings.duplicate_similarity, color="black", linewidth=0.8, linestyle="--")
    return figure


def _histogram(axes: Axes, groups: Mapping[str, np.ndarray]) -> None:
    everything = np.concatenate(list(groups.values()))
    if not len(everything):
        axes.text(0.5, 0.5, "no pairs compared", ha="center", transform=axes.transAxes)
        return
    low = float(everything.min())
    # A bar for every clip says nothing of how they lie.
    count = min(_BINS, max(10, len(everything) // 10))
    bins = np.linspace(low, max(float(everything.max()), low + 1e-3), count + 1).tolist()
    for label, values in groups.items():
        axes.hist(values, bins=bins, histtype="stepfilled", alpha=0.7, label=f"{label}: {len(values):,}")
    # A few outliers beside a million clips can only be seen so.
    axes.set(yscale="log", ylabel="clips", ylim=(0.7, None))
    _plain_numbers(axes.yaxis)
    axes.legend()


def _plain_numbers(*axes: Axis) -> None:
    """200 and not 2 x 10^2 at the ticks of logarithmic axes, which few clips would fill."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in "25" else ""))


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would pick a display, and keep every figure in memory.
    figure = Figure(figsize=(7 * columns, 4.5))
    figure.subplots_adjust(left=0.12 / columns, right=1 - 0.04 / columns, bottom=0.13, top=0.92, wspace=0.18)
    return figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"font.size": 10}):
        figure.savefig(path, dpi=120)
