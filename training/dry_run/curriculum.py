"""`--dry-run` of `curriculum`: every stage that is not finished, and what concerns all of them together."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_video.config_io import load_config
from megatron_video.layout import Hardware
from training.curriculum import Progress, check_one_launch, read_record, up_to
from training.curriculum_config import CURRICULUM_PRESET_DIR, CurriculumConfig, Stage, resolve_stages
from training.dry_run import check_data
from training.dry_run.command import is_follower, prepare_process, shared_views
from training.dry_run.findings import Findings
from training.dry_run.report import Report
from training.dry_run.request import Request
from training.dry_run.stage_run import check_disks, examine


def dry_run_curriculum(arguments: argparse.Namespace) -> int:
    """A dry run of all stages ahead.

    Returns:
        0 if they can run, else 2.
    """
    if is_follower():
        return 0
    prepare_process()
    findings = Findings()
    report = Report("curriculum", Request.of(arguments, findings), [findings])
    ahead: list[Stage] | None = None
    with findings.check("config"):
        ahead = _ahead(arguments, findings)
    if ahead is not None and report.request is not None:
        _examine(ahead, report, report.request, findings)
    return report.tell(arguments.json)


def _ahead(arguments: argparse.Namespace, findings: Findings) -> list[Stage]:
    curriculum = load_config(CurriculumConfig, arguments.config, arguments.overrides, CURRICULUM_PRESET_DIR)
    stages = up_to(resolve_stages(curriculum), arguments.through)
    root = Path(curriculum.output_dir)
    progress = Progress(read_record(root))
    progress.check(root, curriculum, stages)
    done = [stage.name for stage in stages if stage.name in progress.finished]
    if done:
        findings.note(f"finished already: {', '.join(done)}")
    return [stage for stage in stages if stage.name not in progress.finished]


def _examine(ahead: list[Stage], report: Report, request: Request, findings: Findings) -> None:
    with findings.check("stages"):
        check_one_launch(ahead, request.hardware or Hardware(cuda=True))
    # Nine stages of one model have two or three layouts.
    build = shared_views()
    for number, stage in enumerate(ahead):
        own = Findings(stage.name)
        report.findings.append(own)
        # A stage before it that is finished has left its checkpoint.
        report.stages.append(examine(stage.config, request, own, build, made_before=number > 0))
    check_disks(report.stages, request, findings)
    without = [stage.name for stage in ahead if not stage.config.data.shards and stage.config.data.blend is None]
    if without and check_data.CHECK not in request.skip:
        findings.note(
            f"shards of {', '.join(without)}: common.data.shards=[...] names those of all stages, "
            f"stages.{without[0]}.settings.data.shards=[...] those of one"
        )
