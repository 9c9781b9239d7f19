"""One run, or one stage of a curriculum, from its configuration to its verdict; every check is made that can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_video.layout_rules import refusals
from training.config import PretrainConfig
from training.dry_run import check_checkpoint, check_data, check_disk
from training.dry_run.check_checkpoint import Start, check_start
from training.dry_run.check_data import CheckedData
from training.dry_run.check_disk import DiskNeed, disk_need
from training.dry_run.check_memory import check_memory
from training.dry_run.findings import Findings
from training.dry_run.job_views import JobViews, RankFacts, build_views, layers_text
from training.dry_run.rank_view import Tensors
from training.dry_run.replica_shares import micro_batches_of_replicas, plan_without_data
from training.dry_run.request import Request
from training.planner.plan import Plan, describe

LAYOUT, VIEWS = "layout", "views"
Build = Callable[[Tensors, int], JobViews]


@dataclass
class StageReport:
    """What is known of a run."""

    config: PretrainConfig
    findings: Findings
    views: JobViews | None = None
    start: Start | None = None
    plan: Plan | None = None
    disk: DiskNeed | None = None
    micro_batches: list[int] = field(default_factory=list)
    """Of every replica in its first step; without the data, of samples drawn alike from every bucket."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        run = self.config.run
        return {
            "name": self.findings.stage or run.stage,
            "output_dir": run.output_dir,
            "steps": self.config.training.steps,
            "first_step": self.start.step if self.start else None,
            "start": self.start.origin if self.start else None,
            "layout": describe(self.config.parallel),
            "checks": self.findings.checks,
            "views": self._view_values(),
            "ranks_by_stage": self.rank_rows(),
            "disk": self.disk.values() if self.disk else None,
            "plan": self.plan.values() if self.plan else None,
        }

    def rank_rows(self) -> list[dict[str, Any]]:
        """What the ranks of each pipeline stage hold; sizes in bytes, [least, most] where they differ."""
        if self.views is None:
            return []
        by_stage: dict[int, list[RankFacts]] = {}
        for facts in self.views.ranks:
            by_stage.setdefault(facts.coordinates.pp, []).append(facts)
        return [_row(stage, members, self.micro_batches) for stage, members in by_stage.items()]

    def _view_values(self) -> dict[str, Any] | None:
        views = self.views
        if views is None:
            return None
        return {
            "built": views.built,
            "ranks": views.world_size,
            "data_parallel_size": views.grid.shape[1],
            "parameters": views.parameters,
            "checkpoint_tensors": len(views.stored_with_optimizer),
            "checkpoint_bytes": views.checkpoint_bytes,
        }


def examine(
    config: PretrainConfig,
    request: Request,
    findings: Findings,
    build: Build = build_views,
    made_before: bool = False,
) -> StageReport:
    """Check a run and build its ranks' views.

    Args:
        config: of the run.
        request: how many ranks, where, and what is left out.
        findings: of this run.
        build: gives the views of a job; stages of one model share them.
        made_before: run.initial_weights is a stage that the same job runs first.
    """
    report = StageReport(config, findings)
    data = _data(config, request, findings)
    _check_layout(config, request, data, findings)
    if findings.passed(LAYOUT):
        with findings.check(VIEWS):
            report.views = build(Tensors.of(config), request.world_size)
            _tell_substitutes(config, findings)
    identity = data.identity if data is not None else None
    if check_checkpoint.CHECK in request.skip:
        findings.pass_over(check_checkpoint.CHECK)
    else:
        report.start = check_start(config, report.views, identity, findings, made_before)
    if report.views is not None:
        report.plan = check_memory(config, request, data, report.views, findings)
        _measure(report, data)
    return report


def check_disks(reports: list[StageReport], request: Request, findings: Findings) -> None:
    """Room for the checkpoints of all runs together: a finished stage's stay where they are."""
    if check_disk.CHECK in request.skip:
        findings.pass_over(check_disk.CHECK)
        return
    needs = [report.disk for report in reports if report.disk is not None]
    check_disk.check_disk(needs, findings)
    if len(needs) < len(reports):
        findings.leave_out(check_disk.CHECK, "checkpoints of a layout that does not work have no size")


def _data(config: PretrainConfig, request: Request, findings: Findings) -> CheckedData | None:
    if check_data.CHECK not in request.skip:
        if findings.stage is None and not config.data.shards and config.data.blend is None:
            findings.note("a run without its data is planned with --skip data")
        return check_data.check_data(config, findings)
    for name in (check_data.CHECK, *(name for name in ("validation", "samples") if getattr(config, name).every)):
        findings.pass_over(name)
    return None


def _check_layout(config: PretrainConfig, request: Request, data: CheckedData | None, findings: Findings) -> None:
    buckets = list(data.data.buckets) if data is not None else None
    findings.checks.setdefault(LAYOUT, "ok")
    for reason in refusals(config.layout(request.world_size, request.hardware, buckets)):
        findings.refuse(LAYOUT, reason)
    if request.hardware is None:
        findings.pass_over("hardware")
    elif config.parallel.transformer_impl == "transformer_engine" or config.fp8.recipe is not None:
        findings.leave_out(
            "packages", "whether Transformer Engine is on the nodes: `megatron-video doctor` there tells"
        )


def _tell_substitutes(config: PretrainConfig, findings: Findings) -> None:
    parallel = config.parallel
    if parallel.transformer_impl == "transformer_engine":
        findings.note(
            "views have layers of torch in place of Transformer Engine's, which has no meta device here: parameters, "
            "their names and cuts are the same"
        )
    if parallel.use_megatron_fsdp:
        findings.note("Megatron-FSDP cuts by rows, unequally by some; a rank's sizes are those of equal shares")


def _measure(report: StageReport, data: CheckedData | None) -> None:
    """What needs the views: sizes on the disk, shares of the replicas."""
    views, config = report.views, report.config
    assert views is not None
    first = report.start.step if report.start else 0
    seconds = report.plan.seconds.total if report.plan else None
    with report.findings.check("sizes"):
        report.disk = disk_need(config, views.checkpoint_bytes, first, seconds)
    with report.findings.check(LAYOUT):
        plan = data.plan if data is not None else plan_without_data(config)
        if plan is not None:
            report.micro_batches = micro_batches_of_replicas(plan, views.grid.shape[1])


def _row(stage: int, members: list[RankFacts], micro_batches: list[int]) -> dict[str, Any]:
    sizes = ("parameters", "weights", "gradients", "optimizer", "ema", "model_state")
    row: dict[str, Any] = {"pipeline_stage": stage, "ranks": len(members), "layers": layers_text(members[0].layers)}
    for name in sizes:
        values = [getattr(facts, name) for facts in members]
        row[name] = [min(values), max(values)]
    row["micro_batches"] = [min(micro_batches), max(micro_batches)] if micro_batches else None
    return row
