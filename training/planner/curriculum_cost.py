"""What a whole curriculum costs, stage by stage, waits and failures included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_video.dit.config import DiTConfig
from megatron_video.errors import UserError
from training.curriculum_config import Stage
from training.planner import table6
from training.planner.cluster import Cluster
from training.planner.failures import DAY, Recovery
from training.planner.imbalance import slowest_factors
from training.planner.mix import samples_of, step_of
from training.planner.plan import HOUR, Plan, Refusal, describe, judge
from training.planner.report import Report, failure_note, jitter_note, optional, percent, storage_note
from training.planner.search import search
from training.planner.tables import Formats, Table

_TOO_MANY = "more replicas than micro-batches"


@dataclass(frozen=True)
class StageCost:
    """One stage on its GPUs."""

    stage: Stage
    plan: Plan
    step_seconds: float
    """With the wait for the slowest replica."""
    effective: float
    """Share of the time that failures and the configured saves leave."""
    drawn: float
    """Samples of a step without the images on top."""

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.step_seconds * self.plan.steps / self.effective

    def values(self) -> dict[str, Any]:
        """For a table or JSON."""
        job, plan, cluster = self.plan.job, self.plan, self.plan.job.cluster
        hours = self.seconds * plan.gpus / HOUR
        price, watts = cluster.price_per_gpu_hour, cluster.watts_per_gpu
        return {
            "stage": self.stage.name,
            "gpus": plan.gpus,
            "layout": describe(plan.parallel),
            "steps": plan.steps,
            "samples": job.samples * plan.steps,
            "tokens": job.tokens * plan.steps,
            "flops": job.flops * plan.steps,
            "step_seconds": self.step_seconds,
            "mfu_percent": plan.mfu_percent * plan.seconds.total / self.step_seconds,
            "effective": self.effective,
            "days": self.seconds / DAY,
            "gpu_hours": hours,
            "cost": None if price is None else price * hours,
            "megawatt_hours": None if watts is None else watts * hours / 1e6,
        }


@dataclass(frozen=True)
class CurriculumCost:
    """All stages that work."""

    stages: Sequence[StageCost]
    refused: Mapping[str, Refusal]
    """By name."""
    notes: Sequence[str]
    """What was chosen for a stage."""
    cluster: Cluster

    def rows(self) -> list[dict[str, Any]]:
        """Stage by stage, and their sum."""
        rows = [stage.values() for stage in self.stages]
        return [*rows, _total(rows)] if rows else []

    def report(self, name: str) -> Report:
        """As tables."""
        heads = {**_HEADS, "cost": f"cost {self.cluster.currency}"}
        shown = {key: form for key, form in _FORMATS.items() if key not in self._unpriced()}
        tables = [Table("Stages", self.rows(), shown, heads)]
        beside = [row for stage in self.stages if (row := _beside_paper(stage)) is not None]
        if beside:
            tables.append(Table("Beside Table 6 of arXiv 2502.10248", beside, _PAPER_FORMATS, _PAPER_HEADS))
        notes = [
            *(f"{stage}: does not work: {refusal.kind}: {refusal.reason}" for stage, refusal in self.refused.items()),
            *self.notes,
            "days, GPU-hours, cost and energy are with waits for the slowest replica, failures, restarts and saves as "
            "configured; without encoding (plan encoders), validation and queues",
            *([_PAPER_NOTE] if beside else []),
            jitter_note(self.cluster),
            failure_note(self.cluster),
            storage_note(self.cluster),
        ]
        values = {"refused": {stage: refusal.values() for stage, refusal in self.refused.items()}}
        return Report(f"Curriculum {name} on {self.cluster.gpu}", tables, notes, values)

    def _unpriced(self) -> set[str]:
        cluster = self.cluster
        return {
            *(["cost"] if cluster.price_per_gpu_hour is None else []),
            *(["megawatt_hours"] if cluster.watts_per_gpu is None else []),
        }


_FORMATS: Formats = {
    "stage": str,
    "gpus": lambda value: "" if value is None else f"{value:,}",
    "layout": str,
    "steps": lambda value: f"{value:,}",
    "samples": lambda value: f"{value:.3g}",
    "tokens": lambda value: f"{value:.3g}",
    "flops": lambda value: f"{value:.3g}",
    "step_seconds": optional(2),
    "mfu_percent": optional(1),
    "effective": percent(1),
    "days": optional(2),
    "gpu_hours": optional(0),
    "cost": optional(0),
    "megawatt_hours": optional(0),
}
_HEADS = {
    "flops": "FLOP",
    "step_seconds": "s a step",
    "mfu_percent": "MFU %",
    "effective": "effect. %",
    "gpu_hours": "GPU-hours",
    "megawatt_hours": "MWh",
}
_PAPER_FORMATS: Formats = {
    "stage": str,
    "steps": lambda value: f"{value:,}",
    "paper_steps": lambda value: f"{value:,}",
    "seen": lambda value: f"{value:.4g}",
    "paper_seen": lambda value: f"{value:.3g}",
    "residual_percent": lambda value: f"{value:+.1f}",
    "drawn": lambda value: f"{value:.4g}",
    "flops": lambda value: f"{value:.3g}",
    "table_3": str,
    "mfu_percent": optional(1),
    "paper_mfu_percent": optional(0),
    "mfu_residual": lambda value: "-" if value is None else f"{value:+.1f}",
}
_PAPER_HEADS = {
    "paper_steps": "paper",
    "seen": "samples",
    "paper_seen": "paper's",
    "residual_percent": "residual %",
    "drawn": "drawn",
    "flops": "FLOP",
    "table_3": "paper's samples x Table 3",
    "mfu_percent": "MFU %",
    "paper_mfu_percent": "measured",
    "mfu_residual": "residual",
}
_PAPER_NOTE = (
    "samples: steps times data.global_batch_size, as Table 6 counts; drawn: what `bucket_micro_batch_sizes: auto` "
    "makes of it, without the images on top. FLOP are with those images; the paper's mix of lengths and images is not "
    "published, so its samples times Table 3 are a range from all 68 to all 204 frames (none of 544 x 992 is in it). "
    "The paper gives no days, GPU-hours or cost"
)


def cost_curriculum(
    stages: Sequence[Stage],
    cluster: Cluster,
    text_tokens: int,
    gpus_of: Mapping[str, int] | None = None,
    all_layouts: bool = False,
) -> CurriculumCost:
    """Judge every stage on its GPUs.

    Args:
        stages: in order.
        cluster: its number of GPUs is what each stage gets, at most as many as its batch feeds.
        text_tokens: visible text tokens of a sample.
        gpus_of: another number for single stages.
        all_layouts: take each stage's fastest layout instead of the configured one.

    Raises:
        UserError: gpus_of names no stage.
    """
    gpus_of = gpus_of or {}
    names = [stage.name for stage in stages]
    for name in gpus_of:
        if name not in names:
            raise UserError(f"--gpus-of {name}={gpus_of[name]}: no such stage; there are {', '.join(names)}")
    costs, refused, notes = [], {}, []
    for stage in stages:
        mine = replace(cluster, gpus=gpus_of.get(stage.name, cluster.gpus))
        found = _plan(stage, mine, text_tokens, all_layouts)
        if isinstance(found, Refusal) and found.kind == _TOO_MANY and stage.name not in gpus_of:
            mine = replace(mine, gpus=_fed_gpus(stage, mine))
            found = _plan(stage, mine, text_tokens, all_layouts)
            notes.append(f"{stage.name}: on {mine.gpus:,} GPUs, as its batch feeds no more")
        if isinstance(found, Refusal):
            refused[stage.name] = found
        else:
            costs.append(_cost(stage, found))
    return CurriculumCost(costs, refused, notes, cluster)


def _plan(stage: Stage, cluster: Cluster, text_tokens: int, all_layouts: bool) -> Plan | Refusal:
    config, step = stage.config, step_of(stage.config, text_tokens)
    if not all_layouts:
        return judge(config, cluster, step, config.parallel, leave_idle=True)
    found = search(config, cluster, step)
    return found.best or found.refusal_counts()[0][2]


def _fed_gpus(stage: Stage, cluster: Cluster) -> int:
    """Of as many replicas as the step has items to share out, in whole nodes where there are several."""
    config = stage.config
    gpus = config.data.micro_batches_per_step * config.parallel.model_parallel_size
    return min(cluster.gpus, max(gpus - gpus % cluster.gpus_per_node, gpus if gpus < cluster.gpus_per_node else 0))


def _cost(stage: Stage, plan: Plan) -> StageCost:
    config = stage.config
    try:
        slowest = slowest_factors(config, plan.job)[1]
    except UserError as error:
        raise UserError(f"stage {stage.name!r}: {error}") from None
    seconds = plan.seconds_with_waits(slowest)
    recovery = Recovery.of(plan.job, plan.gpus, config.checkpoint.asynchronous)
    effective = recovery.effective(config.training.save_every * seconds, plan.steps * seconds)
    samples = sum(count for count, _ in samples_of(config).values())
    return StageCost(stage, plan, seconds, effective, samples / (1 + (config.data.images_per_video or 0)))


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = ("steps", "samples", "tokens", "flops", "days", "gpu_hours", "cost", "megawatt_hours")
    total: dict[str, Any] = dict.fromkeys(rows[0]) | {"stage": "total", "layout": ""}
    for name in sums:
        values = [row[name] for row in rows]
        total[name] = None if None in values else math.fsum(values)
    total["steps"] = int(total["steps"])
    return total


def _beside_paper(cost: StageCost) -> dict[str, Any] | None:
    paper = table6.ROWS.get(cost.stage.config.run.stage)
    if paper is None or cost.stage.config.model != DiTConfig():
        return None
    values = cost.values()
    seen = float(cost.stage.config.data.global_batch_size * cost.plan.steps)
    bounds = None if paper.table_3 is None else [paper.seen * tflops * 1e12 for tflops in paper.table_3]
    mfu = None if paper.measured_mfu is None else 100 * paper.measured_mfu
    return {
        "stage": cost.stage.name,
        "steps": cost.plan.steps,
        "paper_steps": paper.steps,
        "seen": seen,
        "paper_seen": paper.seen,
        "residual_percent": 100 * (seen / paper.seen - 1),
        "drawn": cost.drawn * cost.plan.steps,
        "flops": values["flops"],
        "table_3": "-" if bounds is None else " to ".join(f"{value:.3g}" for value in dict.fromkeys(bounds)),
        "mfu_percent": values["mfu_percent"],
        "paper_mfu_percent": mfu,
        "mfu_residual": None if mfu is None else values["mfu_percent"] - mfu,
    }
