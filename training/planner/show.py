"""Plans as text: one layout part by part, or all of them ranked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from training.layout_matrix.report import text_table
from training.planner.cluster import GIB
from training.planner.plan import Plan, Refusal, describe
from training.planner.search import Search
from training.planner.step_time import Seconds

_SHOWN = 12


def show_job(plan: Plan) -> str:
    """What runs: model, cluster, step."""
    job = plan.job
    kinds = ", ".join(
        f"{count:,.1f} x [{batch.samples} x {batch.tokens:,} tokens]"
        for batch, count in sorted(job.step.items(), key=lambda item: item[0].tokens)
    )
    return (
        f"{job.shape.parameters.total:,} parameters on {plan.gpus:,} {job.cluster.gpu}\n"
        f"a step: {job.samples:,.0f} samples, {job.tokens:,.0f} tokens, {job.flops / 1e15:,.0f} PFLOP\n"
        f"{textwrap.fill(f'micro-batches: {kinds}', 120, break_on_hyphens=False)}"
    )


def show_plan(plan: Plan) -> str:
    """Memory and time by part, and what the run takes."""
    values = plan.values()
    cost = "" if plan.cost is None else f", {plan.cost:,.0f} {plan.job.cluster.currency}"
    summary = (
        f"MFU {plan.mfu_percent:.2f} % ({values['tflops_per_gpu']:.1f} TFLOP/s a GPU), {plan.seconds.total:.3f} s a "
        f"step, {values['tokens_per_second']:,.0f} tokens/s "
        f"({values['tokens_per_second_and_gpu']:,.0f} a GPU)\n"
        f"{plan.steps:,} steps: {values['days']:,.2f} days, {plan.gpu_hours:,.0f} GPU-hours{cost}; replicas equally "
        "loaded, no stops"
    )
    return "\n\n".join([describe(plan.parallel), _time(plan.seconds), _memory(plan), summary])


def show_search(found: Search) -> str:
    """The fastest layouts, the one to take, and why others do not work."""
    parts = [_ranking(found.plans)] if found.plans else ["no layout works"]
    if found.best is not None and found.simplest is not None:
        parts.append(
            f"best: {describe(found.best.parallel)}, MFU {found.best.mfu_percent:.2f} %\n"
            f"simplest within 1 point: {describe(found.simplest.parallel)}, MFU {found.simplest.mfu_percent:.2f} %"
        )
    parts.append("\n".join([f"refused ({len(found.refusals)} layouts):", *_refusals(found)]))
    return "\n\n".join(parts)


def show_refusal(refusal: Refusal) -> str:
    """Why a layout does not work."""
    return f"{describe(refusal.parallel)}: {refusal.kind}: {refusal.reason}"


def _time(seconds: Seconds) -> str:
    rows = [
        [
            name.replace("_", " "),
            f"{value:.4f}",
            "" if name.startswith("hidden") else f"{100 * value / seconds.total:.1f}",
        ]
        for name, value in seconds.by_part().items()
        if value
    ]
    return text_table(["part", "s a step", "%"], [*rows, ["total", f"{seconds.total:.4f}", "100.0"]])


def _memory(plan: Plan) -> str:
    names = list(plan.peak.by_part())
    stages = [
        [str(number), *(f"{stage.in_gib()[name]:.2f}" for name in names), f"{stage.total / GIB:.2f}"]
        for number, stage in enumerate(plan.memory)
    ]
    usable = f"GiB of a GPU; usable: {plan.job.cluster.usable_bytes / GIB:.1f}"
    return f"{text_table(['stage', *names, 'total'], stages)}\n{usable}"


def _ranking(plans: list[Plan]) -> str:
    rows = [
        [
            describe(plan.parallel),
            f"{plan.mfu_percent:.2f}",
            f"{plan.seconds.total:.3f}",
            f"{plan.peak.total / GIB:.1f}",
            f"{plan.gpu_hours:,.0f}",
            str(plan.gpus - plan.job.cluster.gpus),
        ]
        for plan in plans[:_SHOWN]
    ]
    more = f"\n{len(plans) - _SHOWN} more" if len(plans) > _SHOWN else ""
    return text_table(["layout", "MFU %", "s a step", "GiB", "GPU-hours", "idle GPUs"], rows) + more


def _refusals(found: Search) -> Iterator[str]:
    for kind, count, example in found.refusal_counts():
        yield f"  {count:5,} {kind}; {describe(example.parallel)}: {example.reason}"
