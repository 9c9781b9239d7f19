"""The page and the plot of average_gain.py."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

_COLUMNS = {
    "way": "",
    "of": "n or decay",
    "loss": "validation loss",
    "gain_last_pct": "lower than the last checkpoint's by",
    "worst_gain_last_pct": "than the last, worst seed",
    "gain_median_pct": "than the median",
    "gain_best_pct": "than the best",
}
_COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#999999")


def write_page(path: Path, settings: Mapping[str, Any], rows: Sequence[dict[str, Any]], table: Sequence[Any]) -> None:
    """Write the page, and its plot beside it under the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_path = path.with_suffix(".png")
    plot(rows, plot_path)
    best = max(table, key=lambda row: row["gain_last_pct"])
    last = [row for row in table if row["way"] == "mean of last n"]
    text = [
        f"A DiT of {settings['layers']} layers, width 64, trained for {settings['steps']} steps with the constant "
        f"learning rate {settings['learning_rate']}, a checkpoint every {settings['every']} steps. Losses are those of "
        "`validation`: held-out samples, fixed times, fixed noise. Gains are means over the seeds; median and best are "
        "those of the checkpoints of the second half of the same run. The way is not chosen by the loss.",
        "",
        *_table(table),
        "",
        f"- Against the last checkpoint, the mean of the last {last[-1]['of']} has a loss lower by "
        f"{last[-1]['gain_last_pct']:.1f} %; the best way here ({best['way']}, {best['of']}) by "
        f"{best['gain_last_pct']:.1f} %.",
        "- A tiny model at a rate that was made high: what a real run gains is not said by this.",
        _distances(rows),
    ]
    head = [
        "# Averages of a noisy run's checkpoints",
        "",
        f"Written by `python tests/benchmarks/average_gain.py --shards {settings['shards']} --page {path}` with "
        f"{settings['seeds']} seeds; all figures are in `tests/benchmarks/results/average_gain.json`.",
        "",
    ]
    wrapped = [line if line.startswith("|") else _wrap(line) for line in [*head, *text]]
    path.write_text("\n".join([*wrapped, "", f"![losses and errors]({plot_path.name})"]) + "\n", encoding="utf-8")


def _wrap(line: str) -> str:
    return textwrap.fill(line, 120, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False)


def _table(table: Sequence[Any]) -> list[str]:
    rows = ("| " + " | ".join(_cell(name, row[name]) for name in _COLUMNS) + " |" for row in table)
    return ["| " + " | ".join(_COLUMNS.values()) + " |", "|" + "---|" * len(_COLUMNS), *rows]


def _distances(rows: Sequence[dict[str, Any]]) -> str:
    errors = _errors(rows)
    listed = ", ".join(f"{statistics.mean(found):.1%} at {every}" for every, found in sorted(errors.items()))
    return (
        "- The EMA reconstructed from trained weights, and the one that the run kept (decay 0.98, about 50 steps): "
        "the distance between them, in parts of the distance of the last weights to the kept one, by steps between "
        f"checkpoints: {listed}."
    )


def _errors(rows: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    errors: dict[int, list[float]] = {}
    for row in rows:
        if "error" in row:
            errors.setdefault(row["what"], []).append(row["error"])
    return errors


def _cell(name: str, value: Any) -> str:
    if name.endswith("_pct"):
        return f"{value:.1f} %"
    return f"{value:.4f}" if name == "loss" else str(value)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses of checkpoints and of means, and errors of reconstruction, a colour a seed."""
    from matplotlib import pyplot

    figure, (losses, means, errors) = pyplot.subplots(1, 3, figsize=(15, 4.6))
    for seed, colour in zip(dict.fromkeys(row["seed"] for row in rows), _COLOURS, strict=False):
        ours = [row for row in rows if row["seed"] == seed]
        singles = [row for row in ours if row["kind"] == "checkpoint"]
        (kept,) = (row["loss"] for row in ours if row["kind"] == "EMA kept by the run")
        losses.plot(*_points(singles), color=colour, marker=".", label=f"seed {seed}: checkpoints")
        of_last = [row for row in ours if row["kind"] == "mean of last n"]
        losses.axhline(
            of_last[-1]["loss"], color=colour, ls="--", label=f"seed {seed}: mean of last {of_last[-1]['what']}"
        )
        last = {"what": 1, "loss": singles[-1]["loss"]}
        means.plot(*_points([last, *of_last]), color=colour, marker="o", label=f"seed {seed}: mean of last n")
        means.axhline(kept, color=colour, ls=":", label=f"seed {seed}: EMA 0.98 kept by the run")
        errors.plot(*_points([row for row in ours if "error" in row], "error"), color=colour, marker="o")
    _finish(losses, "step", "validation loss", "Single checkpoints, and their mean")
    _finish(means, "n (1: the last checkpoint)", "validation loss", "Mean of the last n")
    _count_axis(means, [1, *(row["what"] for row in of_last)])
    _finish(errors, "steps between checkpoints", "distance to the kept EMA", "Reconstruction of the EMA (decay 0.98)")
    _count_axis(errors, list(_errors(rows)))
    errors.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _points(rows: Sequence[Mapping[str, Any]], value: str = "loss") -> tuple[list[float], list[float]]:
    return [row["what"] for row in rows], [row[value] for row in rows]


def _count_axis(panel: Any, counts: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])


def _finish(panel: Any, x: str, y: str, title: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_title(title)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=7)
