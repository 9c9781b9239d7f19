"""Pictures of scaling, slow replicas and failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.planner.failures import Recovery, daly_interval, young_interval
from training.planner.report import Report
from training.planner.scale import MODES, Scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"strong": "#b2182b", "weak": "#2166ac"}
_POINTS = 120


def draw_scaling(scaling: Scaling, path: Path) -> None:
    """Tokens/s with the straight line, efficiency and MFU, and what a step consists of, for both curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    speed, share, *parts = figure.subplots(2, 2).flat
    for mode in MODES:
        rows = [row for row in scaling.rows(mode) if row["step_seconds"]]
        if rows:
            _curve(speed, share, rows, mode)
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s", title="speed")
    share.set(xscale="log", ylim=(0, None), xlabel="GPUs", ylabel="%", title="efficiency and MFU")
    for panel in (speed, share):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for mode, panel in zip(MODES, parts, strict=True):
        _parts(panel, [row for row in scaling.rows(mode) if row["step_seconds"]], mode)
    figure.savefig(path, dpi=110)


def draw_stragglers(report: Report, path: Path) -> None:
    """The slowest replica over the mean one against GPUs, cause by cause."""
    from matplotlib.figure import Figure

    rows = [row for row in report.tables[0].rows if not row["refused"]]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    gpus = [row["gpus"] for row in rows]
    for name, label in (("loads", "unequal loads"), ("jitter", "jitter"), ("slow", "slow nodes"), ("all", "all")):
        panel.plot(gpus, [100 * (row[name] - 1) for row in rows], marker=".", label=label)
    simulated, errors = [100 * (row["simulated"] - 1) for row in rows], [200 * row["error"] for row in rows]
    panel.errorbar(gpus, simulated, errors, fmt="k_", capsize=3, label="all, simulated (2 standard errors)")
    panel.set(
        xscale="log",
        ylim=(0, None),
        xlabel="GPUs",
        ylabel="%",
        title="a replica's own part of a step: slowest over mean, less 1",
    )
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=110)


def draw_failures(report: Report, recovery: Recovery, work: float, path: Path) -> None:
    """Effective training time against the interval: closed form, simulation, and the known optima.

    Args:
        report: of `failure_report`.
        recovery: of the run.
        work: seconds of all its steps.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    rows = report.tables[0].rows
    least, most = min(row["minutes"] for row in rows), max(row["minutes"] for row in rows)
    minutes = [least * (most / least) ** (k / _POINTS) for k in range(_POINTS + 1)]
    panel.plot(minutes, [100 * recovery.effective(60 * value, work) for value in minutes], label="closed form")
    panel.errorbar(
        [row["minutes"] for row in rows],
        [100 * row["simulated"] for row in rows],
        [200 * row["error"] for row in rows],
        fmt="k.",
        capsize=3,
        label="simulated (2 standard errors)",
    )
    optima = {"Young": young_interval, "Daly": daly_interval}
    for (name, interval), style in zip(optima.items(), ("--", ":"), strict=True):
        at = interval(recovery.blocked, recovery.between_failures) / 60
        panel.axvline(at, color="grey", linestyle=style, label=f"{name}'s optimum")
    configured = rows[0]["minutes"]
    panel.axvline(configured, color="#b2182b", linewidth=0.8, label="as configured")
    panel.set(xscale="log", xlabel="minutes of training between saves", ylabel="effective training time, %")
    panel.set_title(report.title)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _curve(speed: Axes, share: Axes, rows: Sequence[dict[str, Any]], mode: str) -> None:
    gpus, colour = [row["gpus"] for row in rows], _COLOURS[mode]
    first = rows[0]
    speed.plot(gpus, [row["tokens_per_second"] for row in rows], marker=".", color=colour, label=mode)
    line = [first["tokens_per_second"] * count / first["gpus"] for count in gpus]
    speed.plot(gpus, line, color=colour, linestyle=":", label=f"{mode}: as {first['gpus']} GPUs, each")
    share.plot(gpus, [100 * row["efficiency"] for row in rows], marker=".", color=colour, label=f"{mode}: efficiency")
    share.plot(
        gpus, [row["mfu_percent"] for row in rows], marker=".", color=colour, linestyle="--", label=f"{mode}: MFU"
    )


def _parts(panel: Axes, rows: Sequence[dict[str, Any]], mode: str) -> None:
    names = [f"{row['gpus']:,}" for row in rows]
    below = [0.0] * len(rows)
    from matplotlib import colormaps

    # A part has one colour in both panels.
    colours = colormaps["tab20"]
    for number, part in enumerate(rows[0]["parts"] if rows else ()):
        # The GPUs left idle are part of every second, not one beside the others.
        shares = [100 * row["parts"][part] / row["step_seconds"] for row in rows]
        if part == "idle_gpus" or max(shares) < 0.5:
            continue
        panel.bar(names, shares, bottom=below, label=part.replace("_", " "), color=colours(number))
        below = [low + share for low, share in zip(below, shares, strict=True)]
    panel.set(title=f"{mode}: what a step consists of", xlabel="GPUs", ylabel="%")
    panel.tick_params(axis="x", labelsize=7, rotation=45)
    panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=5)
