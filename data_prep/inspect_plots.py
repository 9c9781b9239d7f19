"""Plots of `megatron-video data inspect`: channels, posterior noise, text lengths and buckets on one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_video.files import appearing

PLOT_FILE = "statistics.png"
_BUCKETS_SHOWN = 20
_BINS = 60


def write_plots(report: Mapping[str, Any], tokens: npt.NDArray[Any], out: Path) -> Path:
    """Write statistics.png.

    Args:
        report: `InspectReport` as a dict.
        tokens: [samples] Step-LLM tokens of every caption.
        out: folder.
    """
    # No pyplot: it keeps figures alive and may look for a display.
    figure = Figure(figsize=(13, 8), layout="constrained")
    channels, noise, text, buckets = figure.subplots(2, 2).flat
    _channels(channels, report["latents"])
    _noise(noise, report["latents"])
    _text(text, tokens)
    _buckets(buckets, report["buckets"])
    figure.suptitle(f"{report['folder']}: {report['samples']} samples")
    path = out / PLOT_FILE
    with appearing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return path


def _channels(axes: Axes, latents: Mapping[str, Any]) -> None:
    numbers = np.arange(len(latents["mean"]))
    axes.errorbar(numbers, latents["mean"], yerr=latents["deviation"], fmt="o", markersize=3, linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="latents: mean and standard deviation", xlabel="channel", ylabel="posterior mean")


def _noise(axes: Axes, latents: Mapping[str, Any]) -> None:
    deviation, noise = np.asarray(latents["deviation"]), np.asarray(latents["posterior_deviation"])
    numbers = np.arange(len(noise))
    axes.bar(numbers - 0.2, deviation, width=0.4, label="signal: deviation of the mean")
    axes.bar(numbers + 0.2, noise, width=0.4, label="noise: posterior deviation")
    # Channels whose noise is as large as their signal carry nothing.
    axes.set(title="latents: signal and noise", xlabel="channel", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _text(axes: Axes, tokens: npt.NDArray[Any]) -> None:
    # Bins of whole tokens, with their middle on the number.
    width = max(1, (int(tokens.max() - tokens.min()) + 1) // _BINS)
    edges = np.arange(tokens.min(), tokens.max() + 2 * width, width) - 0.5
    axes.hist(tokens, bins=edges.tolist())
    axes.set(title="caption length", xlabel="Step-LLM tokens", ylabel="samples")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _buckets(axes: Axes, buckets: list[Mapping[str, Any]]) -> None:
    shown = sorted(buckets, key=lambda bucket: -bucket["samples"])[:_BUCKETS_SHOWN]
    bars = axes.barh([bucket["bucket"] for bucket in shown], [bucket["samples"] for bucket in shown])
    # Images have no hours.
    hours = [f" {bucket['hours']:.3g} h" if bucket["hours"] else "" for bucket in shown]
    axes.bar_label(bars, labels=hours, fontsize=8)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="buckets (frames x height x width)", xlabel="samples")
