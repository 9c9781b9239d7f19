"""Pictures of a curriculum's cost and of encoding."""

from __future__ import annotations

from pathlib import Path

from training.planner.curriculum_cost import CurriculumCost
from training.planner.encoders import EncodingPlan

_POINTS = 60


def draw_curriculum(found: CurriculumCost, path: Path) -> None:
    """GPU-hours and days of every stage, and its MFU."""
    from matplotlib.figure import Figure

    rows = found.rows()[:-1]
    figure = Figure(figsize=(13, 1.8 + 0.45 * len(rows)), layout="constrained")
    hours, days, mfu = figure.subplots(1, 3, sharey=True)
    names = [f"{row['stage']}\n{row['gpus']:,} GPUs" for row in rows]
    for panel, field, label, digits in (
        (hours, "gpu_hours", "GPU-hours", 0),
        (days, "days", "days", 1),
        (mfu, "mfu_percent", "MFU, %", 1),
    ):
        bars = panel.barh(names, [row[field] for row in rows], color="#2166ac")
        panel.bar_label(bars, [f"{row[field]:,.{digits}f}" for row in rows], padding=3, fontsize=8)
        panel.set(xlabel=label)
        panel.margins(x=0.2)
        panel.grid(axis="x", alpha=0.3)
    hours.tick_params(axis="y", labelsize=8)
    hours.invert_yaxis()
    figure.savefig(path, dpi=110)


def draw_encoding(found: EncodingPlan, path: Path) -> None:
    """GPU-hours of the three ways, and of encoding by how often a sample is seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    ways, epochs = figure.subplots(1, 2)
    rows = found.ways()
    names = [row["how"].replace(", ", ",\n") for row in rows]
    hours = [row["gpu_hours"] for row in rows]
    training = [row["training_days"] * 24 * row["training_gpus"] for row in rows]
    ways.bar(names, training, label="training", color="#2166ac")
    ways.bar(
        names, [a - b for a, b in zip(hours, training, strict=True)], bottom=training, label="encoding", color="#ef8a62"
    )
    ways.set(ylabel="GPU-hours", title="each sample seen once")
    ways.margins(y=0.15)
    ways.legend()
    seen = [1 + 19 * k / _POINTS for k in range(_POINTS + 1)]
    every = found.encoding_gpu_hours() * (1 + found.headroom)
    epochs.plot(seen, [every] * len(seen), label="encoded every time, with headroom", color="#b2182b")
    epochs.plot(seen, [found.encoding_gpu_hours(count) for count in seen], label="encoded once, ahead", color="#2166ac")
    epochs.axvline(
        found.break_even_epochs(),
        color="grey",
        linestyle="--",
        label=f"break-even: {found.break_even_epochs():.2f}",
    )
    epochs.set(
        ylim=(0, None),
        xlabel="times that a sample is seen in the stage",
        ylabel="GPU-hours of encoding",
        title="encoding",
    )
    epochs.grid(alpha=0.3)
    stored = epochs.twinx()
    stored.plot(seen, [found.stored_terabytes(count) for count in seen], color="#1b7837", linestyle=":", label="stored")
    stored.set(ylim=(0, 1.6 * found.stored_terabytes()), ylabel="TB in shards, dotted")
    epochs.legend(fontsize=8)
    figure.savefig(path, dpi=110)
