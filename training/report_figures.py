"""The pictures of a run's report; each is a PNG, or None where the run has nothing to show."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from training.effective_time import WallTime, find_lives, held_up
from training.run_records import GIB, Floats, RunRecords
from training.time_bins import TIME_BINS, bin_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More points than pixels show nothing more.
_POINTS = 400
_WIDTH, _HEIGHT, _DPI = 10.0, 3.0, 100
_FAULTS = {
    "refused_step": ("x", "tab:red"),
    "spike": ("v", "tab:orange"),
    "rollback": ("<", "tab:purple"),
    "hang": ("s", "black"),
    "straggler": ("d", "tab:brown"),
    "corrupt_sample": (".", "tab:gray"),
}
_RESTART_COLOUR = "tab:green"


def loss_figure(records: RunRecords) -> bytes:
    """Loss over steps with what was undone, restarts and faults."""

    def draw(axes: Axes) -> None:
        steps = records.steps
        lost = ~steps.kept
        axes.plot(steps["step"][lost], steps["loss"][lost], ".", color="silver", markersize=3, label="undone steps")
        _curve(axes, steps.kept_column("step"), steps.kept_column("loss"), "tab:blue", "loss")
        _mark_restarts(axes, records)
        _mark_faults(axes, records)
        axes.set_ylabel("loss")
        axes.legend(loc="upper right", fontsize=8)

    return _figure(draw)


def loss_by_time_figure(records: RunRecords) -> bytes | None:
    """Loss of every part of t over steps."""
    steps = records.steps
    at, losses = _binned_by_time(records)
    if not np.isfinite(losses).any():
        return None

    def draw(axes: Axes) -> None:
        colours = _colours(TIME_BINS)
        for index in range(TIME_BINS):
            axes.plot(at, losses[:, index], color=colours[index], label=f"t {bin_label(index)}", linewidth=1.2)
        axes.set_ylabel("loss")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)

    return _figure(draw) if len(steps) else None


def validation_figure(records: RunRecords) -> bytes | None:
    """Losses on held-out samples over steps, and at every quantile of t."""
    events = records.kept_events_of("validation")
    if not events:
        return None

    def draw(curve: Axes, quantiles: Axes) -> None:
        for weights, style in (("trained", "o-"), ("averaged", "s--")):
            known = [event for event in events if weights in event["losses"]]
            pairs = [(event["step"], event["losses"][weights]["loss"]) for event in known]
            if pairs:
                curve.plot(*zip(*pairs, strict=True), style, markersize=3, label=f"{weights} weights")
        curve.set_ylabel("held-out loss")
        curve.legend(fontsize=8)
        shown = _spread(events, 5)
        for event, colour in zip(shown, _colours(len(shown)), strict=True):
            losses = next(iter(event["losses"].values()))["by_time"]
            quantiles.plot(
                event["quantiles"], losses, "o-", color=colour, markersize=3, label=f"step {event['step']:,}"
            )
        quantiles.set_xlabel("quantile of t (0: noise)")
        quantiles.set_ylabel("held-out loss")
        quantiles.legend(fontsize=8)

    return _figure(draw, columns=2)


def gradient_figure(records: RunRecords) -> bytes:
    """Gradient norm and learning rate over steps."""

    def draw(axes: Axes) -> None:
        step, norm = records.steps.kept_column("step"), records.steps.kept_column("grad_norm")
        _curve(axes, step, norm, "tab:blue", "gradient norm")
        finite = norm[np.isfinite(norm)]
        if len(finite) and finite.min() > 0 and finite.max() > 10 * np.median(finite):
            axes.set_yscale("log")
        axes.set_ylabel("gradient norm", color="tab:blue")
        rate = axes.twinx()
        rate.plot(step, records.steps.kept_column("learning_rate"), color="tab:orange", linewidth=1)
        rate.set_ylabel("learning rate", color="tab:orange")
        _mark_restarts(axes, records)

    return _figure(draw)


def throughput_figure(records: RunRecords) -> bytes:
    """Tokens a second and MFU (or TFLOP/s of a device) over steps."""

    def draw(axes: Axes) -> None:
        steps = records.steps
        at, seconds = _sums(steps.kept_column("step"), steps.kept_column("step_seconds"))
        _, tokens = _sums(steps.kept_column("step"), steps.kept_column("tokens"))
        _, flops = _sums(steps.kept_column("step"), steps.kept_column("flops"))
        axes.plot(at, tokens / seconds, color="tab:blue", linewidth=1.2)
        axes.set_ylabel("tokens / s", color="tab:blue")
        axes.set_ylim(bottom=0)
        use = axes.twinx()
        peak = records.peak_flops
        scale = 1e-12 / records.lives[-1]["world_size"] if peak is None else 100 / peak
        use.plot(at, flops / seconds * scale, color="tab:orange", linewidth=1.2, linestyle="--")
        use.set_ylabel("TFLOP/s a device" if peak is None else "MFU, %", color="tab:orange")
        use.set_ylim(bottom=0)
        _mark_restarts(axes, records)

    return _figure(draw)


def step_time_figure(records: RunRecords) -> bytes:
    """Seconds of a step, and of those waiting for data."""

    def draw(axes: Axes) -> None:
        steps = records.steps
        _curve(axes, steps.kept_column("step"), steps.kept_column("step_seconds"), "tab:blue", "step")
        _curve(
            axes, steps.kept_column("step"), steps.kept_column("data_seconds"), "tab:red", "of which waiting for data"
        )
        axes.set_ylim(bottom=0, top=3 * float(np.nanpercentile(steps["step_seconds"], 95)))
        axes.set_ylabel("seconds")
        axes.legend(fontsize=8)
        _mark_restarts(axes, records)

    return _figure(draw)


def memory_figure(records: RunRecords) -> bytes | None:
    """Memory of the fullest rank over steps."""
    names = {"host_rss": "host, one rank", "cuda_allocated": "device, tensors", "cuda_reserved": "device, reserved"}
    measured = records.steps.memory
    if not measured:
        return None

    def draw(axes: Axes) -> None:
        for key, label in names.items():
            values = [memory.get(key, 0) / GIB for _, memory in measured]
            if any(values):
                axes.plot([step for step, _ in measured], values, ".-", markersize=3, linewidth=1, label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("GiB")
        axes.legend(fontsize=8)

    return _figure(draw)


def layer_figure(records: RunRecords) -> bytes | None:
    """Sizes of activations and gradients by layer over steps."""
    measured = records.steps.layer_norms
    kinds = {"activation_rms": "RMS of the output", "grad_norm": "gradient norm"}
    if not measured:
        return None

    def draw(*panels: Axes) -> None:
        for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
            parts = list(measured[-1][1][kind])
            for part, colour in zip(parts, _colours(len(parts)), strict=True):
                values = [sizes[kind].get(part, np.nan) for _, sizes in measured]
                axes.plot([step for step, _ in measured], values, color=colour, linewidth=1, label=part)
            axes.set_yscale("log")
            axes.set_ylabel(label)
            if len(parts) <= 12:
                axes.legend(fontsize=6, ncol=2, framealpha=0.5)

    return _figure(draw, columns=len(kinds))


def wall_time_figure(records: RunRecords, spent: WallTime) -> bytes:
    """Steps over wall time, life by life, and what all of it went to."""

    def draw(progress: Axes, shares: Axes) -> None:
        start = find_lives(records)[0].started
        steps = records.steps
        for life in np.unique(steps["life"]):
            mine = steps["life"] == life
            progress.plot((steps["time"][mine] - start) / 60, steps["step"][mine], linewidth=1.5)
        progress.set_xlabel("minutes since the first start")
        progress.set_ylabel("step")
        parts = {name: seconds for name, seconds in spent.parts().items() if seconds > 0}
        # barh draws from the bottom up.
        percent = {name: 100 * seconds / spent.total for name, seconds in reversed(parts.items())}
        bars = shares.barh(list(percent), list(percent.values()))
        shares.bar_label(bars, fmt=" %.2f", fontsize=8)
        shares.set_xlim(right=max(percent.values()) * 1.2)
        shares.set_xlabel("% of the wall time")

    return _figure(draw, columns=2, x_label=None)


def checkpoint_figure(records: RunRecords) -> bytes | None:
    """Seconds of every save, and what training waited for it."""
    saves = records.events_of("save")
    if not saves:
        return None

    def draw(axes: Axes) -> None:
        at = [save["step"] for save in saves]
        axes.plot(at, [save["seconds"] for save in saves], "o", markersize=3, label="until it was complete")
        axes.plot(at, [held_up(save) for save in saves], "s", markersize=3, label="training waited")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=8)

    return _figure(draw)


def _figure(draw: Callable[..., None], columns: int = 1, x_label: str | None = "step") -> bytes:
    # matplotlib takes a second to import, and its figure objects need no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT if columns == 1 else 3.4), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(x_label or "")
    draw(*panels)
    output = io.BytesIO()
    figure.savefig(output, format="png")
    return output.getvalue()


def _curve(axes: Axes, step: Floats, values: Floats, colour: str, label: str) -> None:
    """Single values pale, their means dark."""
    axes.plot(step, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(*_means(step, values), color=colour, linewidth=1.5, label=label)


def _windows(count: int) -> list[slice]:
    cuts = np.linspace(0, count, min(_POINTS, max(count // 5, min(count, 10))) + 1).round().astype(int)
    return [slice(a, b) for a, b in pairwise(cuts) if b > a]


def _means(step: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Middles and means of at most _POINTS neighbouring windows; refused steps are no numbers and left out."""
    windows = _windows(len(step))
    means = [np.mean(values[w][np.isfinite(values[w])]) if np.isfinite(values[w]).any() else np.nan for w in windows]
    return np.array([step[w].mean() for w in windows]), np.array(means)


def _sums(step: Floats, values: Floats) -> tuple[Floats, Floats]:
    windows = _windows(len(step))
    return np.array([step[w].mean() for w in windows]), np.array([np.nansum(values[w]) for w in windows])


def _binned_by_time(records: RunRecords) -> tuple[Floats, Floats]:
    """Middles [m] and mean losses [m, TIME_BINS] of windows; every latent position counts alike."""
    steps = records.steps
    step, kept = steps.kept_column("step"), steps.kept
    losses, positions = np.nan_to_num(steps.loss_by_time[kept]), steps.positions_by_time[kept]
    # Fewer than for one curve: a step has few samples in a tenth of t.
    windows = _windows(len(step))
    groups = [slice(w[0].start, w[-1].stop) for w in _grouped(windows, 4)]
    at = np.array([step[g].mean() for g in groups])
    totals = np.array([(losses[g] * positions[g]).sum(0) for g in groups])
    counts = np.array([positions[g].sum(0) for g in groups])
    with np.errstate(invalid="ignore"):
        return at, np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def _grouped(windows: Sequence[slice], size: int) -> Iterable[Sequence[slice]]:
    return (windows[first : first + size] for first in range(0, len(windows), size))


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.92, max(count, 1))))


def _mark_restarts(axes: Axes, records: RunRecords) -> None:
    for number, life in enumerate(find_lives(records)[1:]):
        label = "restart" if number == 0 else None
        axes.axvline(life.first_step, color=_RESTART_COLOUR, linestyle=":", linewidth=1, label=label)


def _mark_faults(axes: Axes, records: RunRecords) -> None:
    low, high = axes.get_ylim()
    for kind, (marker, colour) in _FAULTS.items():
        at = [event["step"] for event in records.events_of(kind)]
        if at:
            height = [low + 0.03 * (high - low)] * len(at)
            label = kind.replace("_", " ")
            axes.plot(at, height, marker, color=colour, markersize=6, linestyle="none", label=label)
