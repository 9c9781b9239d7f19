"""What each threshold removed: a table, a CSV, and plots (histogram of every tag with its thresholds, the funnel)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.filter_rules import Step, columns_of
from data_prep.filter_verdicts import Tally, numbers
from data_prep.stage import StageReport
from megatron_video.errors import UserError
from megatron_video.manifest import complete_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TABLE_FILE, HISTOGRAMS_FILE, FUNNEL_FILE = "removed.csv", "histograms.png", "funnel.png"
_BINS = 60
_SAMPLED_GROUPS = 16
_SAMPLED_ROWS = 20_000
# Long tails would squeeze all clips into one bar.
_SHOWN_PERCENTILES = (0.5, 99.5)
_PANELS_A_ROW = 3


@dataclass
class Histograms:
    """Counts of every tag that has a threshold, over the clips that came in; the outer bins hold the tails."""

    edges: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]

    @classmethod
    def of(cls, manifest: Path, steps: Sequence[Step]) -> Histograms:
        """Empty histograms whose range comes from a sample of the manifest and from the thresholds."""
        tags: list[str] = list(dict.fromkeys(step.rule.tag for step in steps if step.rule.exclude is None))
        table = _sample(manifest, columns_of(steps))
        edges = {tag: _edges(numbers(table, tag), _bounds(tag, steps)) for tag in tags}
        return cls(edges, {tag: np.zeros(_BINS, np.int64) for tag in tags})

    def add(self, table: pa.Table) -> None:
        """Count the clips of a table that no stage has dropped."""
        kept = table["dropped_by"].is_null().to_numpy(zero_copy_only=False)
        for tag, edges in self.edges.items():
            values = numbers(table, tag)
            values = values[kept & ~np.isnan(values)]
            # What is outside counts in the outer bins: no clip may be missing from the picture.
            self.counts[tag] += np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def print_removed(report: StageReport) -> None:
    """The table on stdout."""
    lines = report.details["removed"]
    width = max(len(_label(line)) for line in lines)
    print(f"{'rule':<{width}}{'fails':>12}{'removed':>12}{'left':>12}")
    for line in lines:
        print(f"{_label(line):<{width}}{line['fails']:>12,}{line['removed']:>12,}{line['left']:>12,}")


def write_report(folder: Path, tally: Tally, histograms: Histograms) -> None:
    """Write removed.csv, histograms.png and funnel.png.

    Raises:
        UserError: matplotlib is not installed.
    """
    _write_csv(folder / TABLE_FILE, tally)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--report: plots need matplotlib: pip install 'megatron-video[data]'") from None
    # Figures of their own, not pyplot's: no display is looked for, and nothing stays open.
    _plot_histograms(Figure, histograms, tally.steps).savefig(folder / HISTOGRAMS_FILE, dpi=110)
    _plot_funnel(Figure, tally).savefig(folder / FUNNEL_FILE, dpi=110)


def funnel(tally: Tally) -> list[tuple[str, int]]:
    """Clips left, from what came in through the common rules and each subset."""
    stages = [("in", tally.entered)]
    left = tally.entered
    for number, step in enumerate(tally.steps):
        left -= tally.removed[step.name]
        last = number + 1 == len(tally.steps) or tally.steps[number + 1].level != step.level
        if last:
            stages.append((step.subset or "common rules", left))
    return stages


def _label(line: dict[str, str]) -> str:
    return f"{line['subset']}: {line['rule']}" if line["subset"] else line["rule"]


def _write_csv(path: Path, tally: Tally) -> None:
    left = tally.entered
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subset", "rule", "fails", "removed", "left"])
        for step in tally.steps:
            left -= tally.removed[step.name]
            writer.writerow([step.subset, step.rule.name, tally.fails[step.name], tally.removed[step.name], left])


def _sample(manifest: Path, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(manifest) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        groups = np.unique(np.linspace(0, file.num_row_groups - 1, _SAMPLED_GROUPS).round().astype(int))
        pieces = [
            next(file.iter_batches(_SAMPLED_ROWS, row_groups=[int(group)], columns=present), None)
            for group in groups
            if file.num_row_groups
        ]
        tables = [pa.Table.from_batches([piece]) for piece in pieces if piece is not None]
        empty = pa.schema([file.schema_arrow.field(name) for name in present]).empty_table()
    return complete_columns(pa.concat_tables([empty, *tables]), columns)


def _bounds(tag: str, steps: Sequence[Step]) -> list[float]:
    rules = [step.rule for step in steps if step.rule.tag == tag]
    return [bound for rule in rules for bound in (rule.min, rule.max) if bound is not None]


def _edges(sample: np.ndarray, bounds: list[float]) -> np.ndarray:
    finite = sample[np.isfinite(sample)]
    typical = np.percentile(finite, _SHOWN_PERCENTILES).tolist() if len(finite) else []
    low, high = min(typical + bounds), max(typical + bounds)
    margin = 0.04 * (high - low) or 0.5
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _plot_histograms(figure_class: type, histograms: Histograms, steps: Sequence[Step]) -> Figure:
    rows = max(1, -(-len(histograms.edges) // _PANELS_A_ROW))
    figure = figure_class(figsize=(4.6 * _PANELS_A_ROW, 2.9 * rows), layout="constrained")
    panels = list(figure.subplots(rows, _PANELS_A_ROW, squeeze=False).flat)
    for tag, panel in zip(histograms.edges, panels, strict=False):
        edges = histograms.edges[tag]
        panel.bar(edges[:-1], histograms.counts[tag], np.diff(edges), align="edge", color="#8aa9c9")
        panel.set_title(tag, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.margins(x=0)
        _draw_thresholds(panel, tag, steps)
    for panel in panels[len(histograms.edges) :]:
        panel.set_axis_off()
    figure.suptitle("clips by tag; smallest kept: solid, largest kept: dashed; outer bars hold the tails", fontsize=10)
    return figure


def _draw_thresholds(panel: Axes, tag: str, steps: Sequence[Step]) -> None:
    levels = max(step.level for step in steps)
    for step in steps:
        if step.rule.tag != tag:
            continue
        # From light to dark as the subsets become stricter; common rules are black.
        colour = (1 - 0.6 * step.level / levels, 0.6 - 0.6 * step.level / levels, 0.2) if step.level else "black"
        lines = [(step.rule.min, "-"), (step.rule.max, "--")]
        drawn = [
            panel.axvline(bound, color=colour, linestyle=style, linewidth=1.4)
            for bound, style in lines
            if bound is not None
        ]
        drawn[0].set_label(f"{step.subset or 'all'} {step.rule.bounds}")
    panel.legend(fontsize=7, loc="best")


def _plot_funnel(figure_class: type, tally: Tally) -> Figure:
    stages = funnel(tally)
    figure = figure_class(figsize=(8, 0.9 + 0.45 * len(stages)), layout="constrained")
    panel = figure.subplots()
    names, counts = [name for name, _ in stages], [count for _, count in stages]
    panel.barh(range(len(stages)), counts, color="#8aa9c9")
    panel.set_yticks(range(len(stages)), names)
    panel.invert_yaxis()
    for number, count in enumerate(counts):
        share = f" ({count / counts[0]:.1%})" if counts[0] else ""
        panel.text(count, number, f" {count:,}{share}", va="center", fontsize=9)
    panel.set_xlim(0, max(counts) * 1.35 or 1)
    panel.set_title("clips left", fontsize=10)
    panel.ticklabel_format(axis="x", style="plain")
    return figure
