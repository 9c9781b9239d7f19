"""Checkpoint interval against effective training time, for one run and beside published figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_video.dit.config import DiTConfig
from training.config import PretrainConfig
from training.planner.cluster import load_cluster
from training.planner.cluster_life import Failures, Storage
from training.planner.failure_simulation import effective_of, simulate_run
from training.planner.failures import DAY, Recovery, daly_interval, young_interval
from training.planner.plan import Plan
from training.planner.report import Report, failure_note, percent, storage_note
from training.planner.shape import ModelShape
from training.planner.stored import checkpoint_bytes
from training.planner.tables import Formats, Table, number

PAPER_EFFECTIVE = 0.99
# Of a parameter in a checkpoint: bf16 weight, fp32 weight, two moments.
_TRAINED_BYTES = 2 + 3 * 4
# Other intervals that are shown, times the best one.
_MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_INTERVALS: Formats = {
    "what": str,
    "save_every": lambda value: f"{value:,}",
    "minutes": number(1),
    "effective": percent(2),
    "simulated": percent(2),
    "error": percent(2),
    "lost_steps": percent(2),
    "saves": percent(2),
    "stopped": percent(2),
}
_HEADS = {
    "save_every": "steps",
    "effective": "effective %",
    "simulated": "simulated %",
    "error": "+-",
    "lost_steps": "lost steps %",
    "saves": "saves %",
    "stopped": "stops %",
}


@dataclass(frozen=True)
class Interval:
    """Steps between saves."""

    what: str
    save_every: int


def failure_report(config: PretrainConfig, plan: Plan, step_seconds: float, runs: int, seed: int) -> Report:
    """Of a run on a cluster.

    Args:
        config: of the run.
        plan: its layout.
        step_seconds: of a step, with all waits.
        runs: simulated for every interval.
        seed: of the first of them.
    """
    recovery = Recovery.of(plan.job, plan.gpus, config.checkpoint.asynchronous)
    steps = plan.steps
    intervals = _intervals(config, recovery, step_seconds)
    rows = [_row(recovery, interval, step_seconds, steps, runs, seed) for interval in intervals]
    cluster, size = plan.job.cluster, checkpoint_bytes(plan.job)
    how = "asynchronous" if config.checkpoint.asynchronous else "synchronous (checkpoint.asynchronous=false)"
    title = f"Checkpoint interval of {steps:,} steps of {step_seconds:.2f} s on {plan.gpus:,} {cluster.gpu}"
    notes = [
        f"a failure every {_hours(recovery.between_failures)}, a planned stop every {_hours(recovery.between_stops)}",
        f"restart: {recovery.restart:.0f} s = {_restart(recovery)}",
        f"a checkpoint has {size / 1e9:,.1f} GB; {how}: a save holds training up for {recovery.blocked:.1f} s and is "
        f"complete {recovery.lag:.1f} s later",
        *_best_notes(recovery),
        "effective training time as in training/effective_time.py: steps in the weights over all time, without "
        "validation and samples; the simulation starts with the first start and ends with the last save",
        failure_note(cluster),
        storage_note(cluster),
    ]
    values = {
        "between_failures_seconds": recovery.between_failures,
        "restart_seconds": {"detect": recovery.detect, "replace": recovery.replace, **recovery.startup},
        "checkpoint_bytes": size,
        "blocked_seconds": recovery.blocked,
        "complete_after_seconds": recovery.lag,
        "best_interval_seconds": recovery.best_interval(),
        "young_seconds": young_interval(recovery.blocked, recovery.between_failures),
        "daly_seconds": daly_interval(recovery.blocked, recovery.between_failures),
    }
    return Report(title, [Table("Steps between saves", rows, _INTERVALS, _HEADS)], notes, values)


def published_effective() -> Table:
    """Effective training time that others published, beside the closed form with this project's assumptions."""
    rows = []
    for name, paper, recovery in (_step_video(), _llama()):
        best = recovery.best_interval()
        effective = recovery.effective(best)
        # What the published share leaves for a failure.
        allowed = (1 - paper) * recovery.between_failures / 60
        rows.append(
            {
                "run": name,
                "between_failures_hours": recovery.between_failures / 3600,
                "restart_minutes": recovery.restart / 60,
                "save_minutes": best / 60,
                "paper": paper,
                "planner": effective,
                "residual": effective - paper,
                "lost_minutes_allowed": allowed,
            }
        )
    formats: Formats = {
        "run": str,
        "between_failures_hours": number(1),
        "restart_minutes": number(1),
        "save_minutes": number(1),
        "paper": percent(1),
        "planner": percent(2),
        "residual": lambda value: f"{100 * value:+.2f}",
        "lost_minutes_allowed": number(1),
    }
    heads = {
        "between_failures_hours": "h between failures",
        "restart_minutes": "restart min",
        "save_minutes": "saved every min",
        "paper": "published %",
        "planner": "planner %",
        "lost_minutes_allowed": "min a failure that the published share leaves",
    }
    return Table("Effective training time that was published", rows, formats, heads)


def _step_video() -> tuple[str, float, Recovery]:
    cluster = load_cluster("h800_step_video")
    size = ModelShape.of(DiTConfig()).parameters.total * _TRAINED_BYTES
    return "Step-Video 30B, 3,000 H800", PAPER_EFFECTIVE, Recovery.on(cluster, size, cluster.gpus, True)


def _llama() -> tuple[str, float, Recovery]:
    """arXiv 2407.21783, 3.3.4: 466 interruptions in 54 days of 16,384 H100, 419 of them unexpected."""
    gpus = 16384
    days = 54 * gpus / 1000
    faults = Failures(per_1000_gpu_days=419 / days, planned_per_1000_gpu_days=47 / days)
    cluster = load_cluster("h100", (f"gpus={gpus}",))
    cluster = replace(cluster, failures=faults, storage=Storage(read_gbps=2000, write_gbps=2000))
    return (
        "Llama 3.1 405B, 16,384 H100 (`more than 90`)",
        0.90,
        Recovery.on(cluster, 405e9 * _TRAINED_BYTES, gpus, True),
    )


def _intervals(config: PretrainConfig, recovery: Recovery, step_seconds: float) -> Iterator[Interval]:
    yield Interval("as configured", config.training.save_every)
    best = recovery.best_interval()
    if math.isinf(best):
        return
    for multiple in _MULTIPLES:
        steps = max(1, round(multiple * best / step_seconds))
        yield Interval("best" if multiple == 1 else f"{multiple:g} x best", min(steps, config.training.steps))


def _row(
    recovery: Recovery, interval: Interval, step_seconds: float, steps: int, runs: int, seed: int
) -> dict[str, Any]:
    training = interval.save_every * step_seconds
    times = [simulate_run(recovery, step_seconds, steps, interval.save_every, seed + run) for run in range(runs)]
    simulated, error = effective_of(times)
    total = sum(time.total for time in times)
    return {
        "what": interval.what,
        "save_every": interval.save_every,
        "minutes": training / 60,
        "effective": recovery.effective(training, steps * step_seconds),
        "simulated": simulated,
        "error": error,
        "lost_steps": sum(time.lost_steps for time in times) / total,
        "saves": sum(time.checkpoints for time in times) / total,
        "stopped": sum(time.startup + time.down for time in times) / total,
    }


def _best_notes(recovery: Recovery) -> list[str]:
    if math.isinf(recovery.between_failures):
        return ["nothing fails: save as seldom as you like"]
    young = young_interval(recovery.blocked, recovery.between_failures)
    daly = daly_interval(recovery.blocked, recovery.between_failures)
    return [
        f"best interval {recovery.best_interval() / 60:.1f} min of training; by Young {young / 60:.1f}, by Daly "
        f"{daly / 60:.1f} min (both for saves that are complete when training goes on)"
    ]


def _restart(recovery: Recovery) -> str:
    parts = {"detect": recovery.detect, "replace": recovery.replace, **recovery.startup}
    return " + ".join(f"{name} {value:.0f}" for name, value in parts.items())


def _hours(seconds: float) -> str:
    return "never" if math.isinf(seconds) else f"{seconds / 3600:,.1f} h ({DAY / seconds:.2f} a day)"
