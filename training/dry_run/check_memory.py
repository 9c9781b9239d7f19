"""Memory and step time of a run, by the planner; model, gradients and optimizer as the ranks' views have them."""

from __future__ import annotations

from dataclasses import replace

from training.config import PretrainConfig
from training.dry_run.check_data import CheckedData
from training.dry_run.findings import Findings
from training.dry_run.job_views import JobViews
from training.dry_run.request import Request
from training.planner.cluster import GIB, Cluster
from training.planner.mix import step_of
from training.planner.plan import Plan, judge
from training.planner.work import MicroBatch

CHECK = "memory"
# Steps over which micro-batches are counted; each has the same number of draws.
_STEPS = 8
# Of a device on which everything fits, to say how much it would be.
_ENDLESS_GIB = 1e6
# Relative difference between planner and views above which it is told.
_TOLD = 0.01


def check_memory(
    config: PretrainConfig, request: Request, data: CheckedData | None, views: JobViews, findings: Findings
) -> Plan | None:
    """What the planner says of the run on its cluster; None without a cluster or a mix of sizes.

    A run that does not fit is refused, and its plan returned all the same.
    """
    if request.cluster is None:
        findings.pass_over(CHECK)
        return None
    with findings.check(CHECK):
        step = step_of(config, request.text_tokens) if data is None else drawn_step(config, data, request.text_tokens)
        found = judge(config, request.cluster, step, config.parallel)
        if not isinstance(found, Plan):
            findings.refuse(CHECK, found.reason)
            found = judge(config, _endless(request.cluster), step, config.parallel)
        if isinstance(found, Plan):
            _compare(found, views, findings)
            return found
    return None


def drawn_step(config: PretrainConfig, checked: CheckedData, text_tokens: int) -> dict[MicroBatch, float]:
    """Micro-batches of a step over all replicas, by kind: the mean of the run's first steps."""
    tokens = checked.data.tokens(config.model)
    counts: dict[MicroBatch, float] = {}
    for step in range(_STEPS):
        for batch in checked.plan.step(step):
            # A preference pair is two rows of a batch.
            rows = len(batch.samples) * (1 if config.dpo is None else 2)
            kind = MicroBatch(rows, tokens[batch.bucket], text_tokens)
            counts[kind] = counts.get(kind, 0.0) + 1 / _STEPS
    return counts


def _endless(cluster: Cluster) -> Cluster:
    return replace(cluster, memory_gib=_ENDLESS_GIB)


def _compare(plan: Plan, views: JobViews, findings: Findings) -> None:
    """The planner computes from the model's sizes; the views are what is built."""
    by_stage: dict[int, int] = {}
    on_host = plan.job.optimizer_on_host
    for facts in views.ranks:
        state = (
            facts.weights + facts.gradients + (facts.ema if plan.job.ema else 0) + (0 if on_host else facts.optimizer)
        )
        by_stage[facts.coordinates.pp] = max(state, by_stage.get(facts.coordinates.pp, 0))
    for stage, held in by_stage.items():
        planned = plan.memory[stage].model_state
        if on_host or abs(planned / held - 1) <= _TOLD:
            continue
        findings.note(
            f"model state of a rank of pipeline stage {stage}: {held / GIB:.2f} GiB are built, the planner counts "
            f"{planned / GIB:.2f} GiB"
        )
