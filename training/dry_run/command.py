"""`--dry-run` of `pretrain`, and what those of the other trainers share with it."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable

from training.config import PretrainConfig
from training.dry_run.findings import Findings
from training.dry_run.job_views import JobViews, build_views
from training.dry_run.rank_view import Tensors
from training.dry_run.report import Report
from training.dry_run.request import Request
from training.dry_run.stage_run import check_disks, examine


def dry_run_pretrain(arguments: argparse.Namespace, name: str, load: Callable[[], PretrainConfig]) -> int:
    """A dry run of one configuration.

    Args:
        arguments: options of the dry run.
        name: of the training.
        load: its configuration, or why the training would refuse it.

    Returns:
        0 if it can run, else 2.
    """
    if is_follower():
        return 0
    prepare_process()
    findings = Findings()
    report = Report(name, Request.of(arguments, findings), [findings])
    config: PretrainConfig | None = None
    with findings.check("config"):
        config = load()
    if config is not None and report.request is not None:
        report.stages = [examine(config, report.request, findings)]
        check_disks(report.stages, report.request, findings)
    return report.tell(arguments.json)


def is_follower() -> bool:
    """Whether another rank of this launch makes the dry run."""
    return int(os.environ.get("RANK", "0")) > 0


def prepare_process() -> None:
    """To be called before anything asks for a GPU: none is used, and on all machines the same code runs.

    Advice on speed and on optional packages is for those who train here, and is not shown.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", module="megatron")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def shared_views() -> Callable[[Tensors, int], JobViews]:
    """Builds views, those of equal models and layouts once."""
    built: dict[str, JobViews] = {}

    def build(tensors: Tensors, world_size: int) -> JobViews:
        if tensors.key not in built:
            built[tensors.key] = build_views(tensors, world_size)
        return built[tensors.key]

    return build
