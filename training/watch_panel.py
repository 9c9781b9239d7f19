"""One run as a panel on a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from statistics import median
from typing import Any

from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from training.events import FAULTS
from training.run_records import GIB, seconds_of
from training.run_tail import RunTail
from training.time_bins import TIME_BINS, bin_label

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 48
# Means are taken over so many steps.
_WINDOW = 50
# No step for so many times the usual time of one, and at least so many seconds, is worth a warning.
_SILENT_STEPS, _SILENT_SECONDS = 10, 60.0
_STATE_COLOURS = {"running": "green", "finished": "cyan", "stopped": "yellow", "failed": "red"}
_EVENTS_SHOWN = 3


def run_panel(tail: RunTail) -> Panel:
    """Everything that is known of the run now."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in _rows(tail):
        grid.add_row(name, value)
    colour = _STATE_COLOURS.get(tail.status["state"], "white")
    return Panel(grid, title=str(tail.folder), title_align="left", border_style=colour)


def sparkline(values: Sequence[float], width: int = _CURVE_WIDTH) -> str:
    """A curve of block characters: `values` from left to right, means where there are more than fit."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    cuts = [round(index * len(finite) / count) for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _rows(tail: RunTail) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("state", _state(tail))]
    if not tail.steps:
        return [*rows, ("step", "none yet"), *_happenings(tail)]
    window = list(tail.steps)[-_WINDOW:]
    rows += [("step", _progress(tail, window)), ("loss", _curve(tail, "loss"))]
    rows += [("loss by t", _by_time(window)), *_validation(tail)]
    rows += [("grad norm", _curve(tail, "grad_norm")), ("learning rate", f"{window[-1]['learning_rate']:.3e}")]
    rows += [("speed", _speed(tail, window)), ("memory", _memory(tail))]
    return rows + _happenings(tail)


def _state(tail: RunTail) -> Text:
    state, life = str(tail.status["state"]), tail.lives[-1]
    text = Text(state, style=_STATE_COLOURS.get(state, "white"))
    text.append(
        f"  start {len(tail.lives)} on {life['world_size']} ranks ({life['host']}), {_ago(life['started'])}", "dim"
    )
    silence = tail.silence()
    if state == "running" and silence is not None and silence > _patience(tail):
        text.append(f"\nno step for {_duration(silence)}: checkpoint, validation, restart, or it hangs", "bold red")
    return text


def _patience(tail: RunTail) -> float:
    return max(_SILENT_SECONDS, _SILENT_STEPS * median(line["step_seconds"] for line in tail.steps))


def _progress(tail: RunTail, window: list[dict[str, Any]]) -> Table:
    step, total = int(window[-1]["step"]), int(tail.config["training"]["steps"])
    seconds = _mean(window, "step_seconds")
    left = f"left {_duration((total - step) * seconds)} at {seconds:.3g} s a step" if step < total else "done"
    row = Table.grid(padding=(0, 2))
    row.add_row(f"{step:,} of {total:,} ({step / total:.1%})", ProgressBar(total=total, completed=step, width=24), left)
    return row


def _curve(tail: RunTail, name: str) -> str:
    values = [line[name] for line in tail.steps]
    recent = [value for value in values[-_WINDOW:] if math.isfinite(value)]
    mean = sum(recent) / len(recent) if recent else float("nan")
    return f"{mean:.4g}  {sparkline(values)}  last {len(values):,} steps"


def _by_time(window: list[dict[str, Any]]) -> str:
    means = []
    for index in range(TIME_BINS):
        pairs = [(line["loss_by_time"][index], line["positions_by_time"][index]) for line in window]
        count = sum(positions for _, positions in pairs)
        means.append(sum((loss or 0.0) * positions for loss, positions in pairs) / count if count else math.nan)
    shown = [f"{mean:.3g}" if math.isfinite(mean) else "-" for mean in means]
    return f"{sparkline(means)}  {' '.join(shown)}  ({bin_label(0)} is noise)"


def _validation(tail: RunTail) -> list[tuple[str, str]]:
    # Of a step that was done again, the last one.
    events = list({event["step"]: event for event in tail.of_kind("validation")}.values())
    if not events:
        return []
    last, rows = events[-1], []
    for number, (weights, losses) in enumerate(last["losses"].items()):
        history = [event["losses"][weights]["loss"] for event in events if weights in event["losses"]]
        name = f"validation at {last['step']:,}" if number == 0 else ""
        rows.append((name, f"{losses['loss']:.4g} {weights}  {sparkline(history, 24)}"))
    return rows


def _speed(tail: RunTail, window: list[dict[str, Any]]) -> str:
    seconds = sum(line["step_seconds"] for line in window)
    parts = [
        f"{sum(line['tokens'] for line in window) / seconds:,.0f} tokens/s",
        f"{sum(line['samples'] for line in window) / seconds:,.2f} samples/s",
    ]
    flops, peak = sum(line["flops"] for line in window) / seconds, tail.config["training"].get("peak_tflops")
    ranks = tail.lives[-1]["world_size"]
    parts.append(
        f"{flops / ranks / 1e12:.3g} TFLOP/s a device" if peak is None else f"MFU {flops / peak / ranks / 1e12:.1%}"
    )
    parts.append(f"waiting for data {sum(line['data_seconds'] for line in window) / seconds:.1%}")
    return ", ".join(parts)


def _memory(tail: RunTail) -> str:
    names = {"cuda_allocated": "tensors on a device", "cuda_reserved": "reserved", "host_rss": "host memory of a rank"}
    known = [f"{tail.memory[key] / GIB:.2f} GiB {name}" for key, name in names.items() if tail.memory.get(key)]
    return ", ".join(known) or "not measured yet"


def _happenings(tail: RunTail) -> list[tuple[str, Any]]:
    saves = tail.of_kind("save")
    rows: list[tuple[str, Any]] = []
    if saves:
        last = saves[-1]
        rows.append(
            (
                "checkpoint",
                f"step {last['step']:,}, {_ago(last['time'])}, {last['seconds']:.1f} s, held up "
                f"{last['blocked_seconds']:.2f} s, {last['bytes'] / GIB:.2f} GiB",
            )
        )
    counts = Counter(event["event"] for event in tail.of_kind(*FAULTS))
    faults = [f"{counts[kind]} {kind.replace('_', ' ')}" for kind in FAULTS if counts[kind]]
    restarts = len(tail.lives) - 1
    rows.append(("faults", ", ".join([f"{restarts} restarts", *faults])))
    for event in tail.of_kind(*FAULTS, "stop")[-_EVENTS_SHOWN:]:
        rows.append(("", Text(f"{_ago(event['time'])}, step {event['step']:,}: {describe_event(event)}", "dim")))
    return rows


def describe_event(event: dict[str, Any]) -> str:
    """An event in words: its name and its own fields."""
    common = ("time", "life", "rank", "event", "step")
    fields = [f"{name} {_shown(value)}" for name, value in event.items() if name not in common]
    return f"{event['event'].replace('_', ' ')}: {', '.join(fields)}" if fields else event["event"]


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mean(window: list[dict[str, Any]], name: str) -> float:
    return float(sum(line[name] for line in window) / len(window))


def _ago(moment: str) -> str:
    return f"{_duration(datetime.now(UTC).timestamp() - seconds_of(moment))} ago"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))
