"""Scaling: the same run on more and more GPUs, with its batch kept (strong) or growing with them (weak)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_video.errors import UserError
from training.config import PretrainConfig
from training.planner.cluster import Cluster
from training.planner.failures import Recovery
from training.planner.imbalance import slowest_factors
from training.planner.mix import step_of
from training.planner.plan import Plan, Refusal, describe, judge
from training.planner.report import Report, failure_note, jitter_note, optional, percent, storage_note
from training.planner.search import fastest_by_size
from training.planner.tables import Formats, Table

Mode = Literal["strong", "weak"]
MODES: tuple[Mode, ...] = ("strong", "weak")
# Of a step: a part below it limits nothing.
_NOTABLE = 0.05
# Numbers of GPUs a replica of which the fastest layout's wait for the slowest replica is looked at.
_CANDIDATES = 6
_WASTES = {
    "tensor_parallel": "tensor-parallel communication",
    "context_parallel": "context-parallel communication",
    "pipeline": "messages between stages",
    "bubble": "pipeline bubble",
    "data_parallel": "data-parallel communication",
    "optimizer": "optimizer",
    "data": "data",
    "unequal_loads": "unequal loads",
    "slow_nodes": "jitter and slow nodes",
    "idle_gpus": "GPUs that make no whole replica",
}


@dataclass(frozen=True)
class ScalePoint:
    """A number of GPUs."""

    mode: Mode
    gpus: int
    global_batch_size: int
    plan: Plan | None
    """None: no layout works."""
    refusal: str = ""
    """Then why."""
    loads_factor: float = 1.0
    """How much longer the slowest replica's own work is for its load ..."""
    slowest_factor: float = 1.0
    """... and with jitter and slow nodes as well."""
    effective: float = 1.0
    """Share of the time that failures and saves at the best interval leave."""

    @property
    def seconds(self) -> float:
        """Of a step, with the wait for the slowest replica."""
        assert self.plan is not None
        return self.plan.seconds_with_waits(self.slowest_factor)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs, while nothing fails."""
        assert self.plan is not None
        return self.plan.job.tokens / self.seconds

    @property
    def mfu_percent(self) -> float:
        """With the wait for the slowest replica, idle GPUs counted."""
        assert self.plan is not None
        return self.plan.mfu_percent * self.plan.seconds.total / self.seconds

    def parts(self) -> dict[str, float]:
        """Seconds of a step by part; GPUs left idle as the part of the step that they would have saved."""
        assert self.plan is not None
        parts = {name: value for name, value in self.plan.seconds.by_part().items() if not name.startswith("hidden")}
        parts["unequal_loads"] = (self.loads_factor - 1) * self._own
        parts["slow_nodes"] = (self.slowest_factor - self.loads_factor) * self._own
        parts["idle_gpus"] = self.seconds * (1 - self.plan.job.cluster.gpus / self.gpus)
        return parts

    @property
    def limit(self) -> str:
        """What costs most beside the model's own work."""
        if self.plan is None:
            return self.refusal
        wastes = {name: value / self.seconds for name, value in self.parts().items() if name in _WASTES}
        largest = max(wastes, key=lambda name: wastes[name])
        return "the model's own work" if wastes[largest] < _NOTABLE else f"{_WASTES[largest]} {wastes[largest]:.0%}"

    def values(self, base: ScalePoint | None) -> dict[str, Any]:
        """Everything, for a table or JSON; efficiency is against `base`, a GPU's tokens/s."""
        values: dict[str, Any] = {"mode": self.mode, "gpus": self.gpus, "global_batch_size": self.global_batch_size}
        if self.plan is None or base is None:
            names = ("step_seconds", "tokens_per_second", "mfu_percent", "efficiency", "effective", "parts")
            return values | {"layout": "none works", **dict.fromkeys(names), "limit": self.limit}
        return values | {
            "layout": describe(self.plan.parallel),
            "step_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu_percent": self.mfu_percent,
            "efficiency": self.tokens_per_second / self.gpus / (base.tokens_per_second / base.gpus),
            "effective": self.effective,
            "limit": self.limit,
            "parts": self.parts(),
        }

    @property
    def _own(self) -> float:
        """What a replica does by itself, before gradients meet."""
        assert self.plan is not None
        return self.plan.seconds.busy + self.plan.seconds.bubble


@dataclass(frozen=True)
class Scaling:
    """Curves over numbers of GPUs."""

    points: Sequence[ScalePoint]
    """Ascending in each mode."""
    cluster: Cluster
    """Whose gpus are what the configured batch is for."""

    @property
    def works(self) -> bool:
        """Whether any number of GPUs does."""
        return any(point.plan for point in self.points)

    def of(self, mode: Mode) -> list[ScalePoint]:
        """One curve."""
        return [point for point in self.points if point.mode == mode]

    def rows(self, mode: Mode) -> list[dict[str, Any]]:
        """Of a curve, against the smallest number of GPUs that works."""
        base = next((point for point in self.of(mode) if point.plan is not None), None)
        return [point.values(base) for point in self.of(mode)]

    def report(self, title: str) -> Report:
        """As tables."""
        titles = {
            "strong": "Strong scaling: the configured batch on every number of GPUs",
            "weak": f"Weak scaling: the batch grows with the GPUs, as configured at {self.cluster.gpus:,}",
        }
        tables = [Table(titles[mode], self.rows(mode), _FORMATS, _HEADS) for mode in MODES if self.of(mode)]
        notes = [
            "efficiency: tokens/s of a GPU against the smallest number of GPUs that works",
            "a step ends with its slowest replica: unequal loads as training deals them, jitter and slow nodes",
            "effective: share of time that failures, restarts and saves at the best interval leave; not in tokens/s",
            jitter_note(self.cluster),
            failure_note(self.cluster),
            storage_note(self.cluster),
        ]
        return Report(title, tables, notes)


_FORMATS: Formats = {
    "gpus": lambda value: f"{value:,}",
    "global_batch_size": lambda value: f"{value:,}",
    "layout": str,
    "step_seconds": optional(2),
    "tokens_per_second": optional(0),
    "mfu_percent": optional(1),
    "efficiency": percent(),
    "effective": percent(),
    "limit": str,
}
_HEADS = {
    "global_batch_size": "batch",
    "step_seconds": "s a step",
    "tokens_per_second": "tokens/s",
    "mfu_percent": "MFU %",
    "efficiency": "effic. %",
    "effective": "effect. %",
}


def scaling(
    config: PretrainConfig,
    cluster: Cluster,
    counts: Sequence[int],
    text_tokens: int,
    all_layouts: bool = True,
    modes: Sequence[Mode] = MODES,
) -> Scaling:
    """Judge a run on every number of GPUs.

    Args:
        config: of the run; its batch is that of strong scaling, and of weak scaling on cluster.gpus.
        cluster: whose number of GPUs is varied.
        counts: numbers of GPUs, ascending.
        text_tokens: visible text tokens of a sample.
        all_layouts: take the fastest layout of all on each number, or the configured one.
        modes: which curves.
    """
    points = [
        _point(
            config, replace(cluster, gpus=gpus), mode, batch_of(config, cluster, gpus, mode), text_tokens, all_layouts
        )
        for mode in modes
        for gpus in counts
    ]
    return Scaling(points, cluster)


def batch_of(config: PretrainConfig, cluster: Cluster, gpus: int, mode: Mode) -> int:
    """Samples of a step, in whole draws."""
    data = config.data
    if mode == "strong":
        return data.global_batch_size
    draws = data.global_batch_size / data.samples_per_draw * gpus / cluster.gpus
    return max(1, round(draws)) * data.samples_per_draw


def gpu_counts(text: str, own: int) -> list[int]:
    """From `8..10240` (doubled from the first to the last, and the cluster's own number), or `8,64,512`.

    Raises:
        UserError: neither of them.
    """
    wanted = "give FIRST..LAST, such as 8..10240, or numbers such as 8,64,512"
    first, dots, last = text.partition("..")
    numbers = [first, last] if dots else text.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--gpus {text}: {wanted}")
    values = [int(number) for number in numbers]
    if not dots:
        return sorted(set(values))
    low, high = values
    if low > high:
        raise UserError(f"--gpus {text}: {low} is more than {high}; {wanted}")
    doubled = {low * 2**power for power in range((high // low).bit_length())}
    return sorted(doubled | {high} | ({own} if low <= own <= high else set()))


def _point(
    config: PretrainConfig, cluster: Cluster, mode: Mode, batch: int, text_tokens: int, all_layouts: bool
) -> ScalePoint:
    config = replace(config, data=replace(config.data, global_batch_size=batch))
    step = step_of(config, text_tokens)
    if not all_layouts:
        found = judge(config, cluster, step, config.parallel, leave_idle=True)
        plans, refused = ([found], "") if isinstance(found, Plan) else ([], found.kind)
    else:
        plans, refusals = fastest_by_size(config, cluster, step, _CANDIDATES)
        refused = _nearest(refusals)
    if not plans:
        return ScalePoint(mode, cluster.gpus, batch, None, refused)
    points = [_dealt(config, ScalePoint(mode, cluster.gpus, batch, plan)) for plan in plans]
    return min(points, key=lambda point: point.seconds if point.plan is not None else math.inf)


def _dealt(config: PretrainConfig, point: ScalePoint) -> ScalePoint:
    """With the waits for the slowest replica; without a plan where training would refuse to share the step out."""
    assert point.plan is not None
    try:
        loads, slowest = slowest_factors(config, point.plan.job)
    except UserError:
        return replace(point, plan=None, refusal="the step cannot be shared out to the replicas")
    effective = _effective(config, point.plan)
    return replace(point, loads_factor=loads, slowest_factor=slowest, effective=effective)


def _nearest(refusals: Sequence[Refusal]) -> str:
    """Why none works: memory, if any layout got so far, else what most of them broke."""
    kinds = Counter(refusal.kind for refusal in refusals)
    return "out of memory" if "out of memory" in kinds else next((kind for kind, _ in kinds.most_common(1)), "")


def _effective(config: PretrainConfig, plan: Plan) -> float:
    recovery = Recovery.of(plan.job, plan.gpus, config.checkpoint.asynchronous)
    return recovery.effective(recovery.best_interval())
