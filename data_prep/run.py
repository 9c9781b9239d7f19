"""`megatron-video data run`: a whole pipeline, each stage into its own file under --work.

With --recipe the stages and their options come from a YAML file (data_prep/recipe_demo.yaml explains itself), and
WORK/report.md tells what each did. Without one: ingest, segment, tag and filter; the last manifest,
WORK/filtered.parquet, is what encode reads. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep import filter as filter_stage
from data_prep import ingest, segment, tag
from data_prep.filter_rules import load_rules
from data_prep.recipe import Run, exit_code, run_recipe
from data_prep.run_report import REPORT_MARKDOWN, StageRun, stage_table
from data_prep.stage import StageReport
from data_prep.workers import Execution, default_workers
from megatron_video.cli import run_command
from megatron_video.errors import UserError

RESULT = "filtered.parquet"


def main(argv: Sequence[str]) -> int:
    """Command line of the whole chain."""
    arguments = _parser().parse_args(argv)
    if arguments.recipe:
        if arguments.min_frames is not None or arguments.rules:
            raise UserError("--min-frames and --rules stand in the recipe, as options of segment and filter")
        return _recipe(arguments)
    missing = [name for name, value in (("--in", arguments.source), ("--work", arguments.work)) if value is None]
    if missing:
        raise UserError(f"data run without --recipe needs {' and '.join(missing)}")
    if arguments.only or arguments.until or arguments.shard or arguments.engine:
        raise UserError("--only, --until, --shard and --engine need --recipe")
    min_frames = segment.MIN_FRAMES if arguments.min_frames is None else arguments.min_frames
    workers = Execution(default_workers() if arguments.workers is None else arguments.workers)
    reports = run(arguments.source, arguments.work, min_frames, arguments.rules or filter_stage.DEFAULT_RULES, workers)
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports], ensure_ascii=False))
    else:
        _print_table(reports)
    return 0


def run(
    source: Path,
    work: Path,
    min_frames: int = segment.MIN_FRAMES,
    rules: Path = filter_stage.DEFAULT_RULES,
    workers: int | Execution = 1,
) -> list[StageReport]:
    """Reports of the four stages; the result is `work`/filtered.parquet."""
    # Before the first stage, not after hours.
    settings = segment.SegmentSettings(min_frames)
    load_rules(rules)
    names = ("ingested.parquet", "segmented.parquet", "tagged.parquet", RESULT)
    ingested, segmented, tagged, filtered = (work / name for name in names)
    return [
        ingest.run(source, ingested, workers),
        segment.run(ingested, segmented, workers, settings),
        tag.run(segmented, tagged, workers),
        filter_stage.run(tagged, filtered, rules),
    ]


def _print_table(reports: Sequence[StageReport]) -> None:
    print(f"{'stage':<10}{'in':>8}{'kept':>8}{'dropped':>9}{'seconds':>9}  why")
    for report in reports:
        why = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items())
        figures = f"{report.rows_in:>8}{report.kept:>8}{report.dropped_here:>9}{report.seconds:>9.1f}"
        print(f"{report.stage:<10}{figures}  {why}")
    print(f"-> {reports[-1].output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-video data run", description=__doc__)
    parser.add_argument("--in", dest="source", type=Path, metavar="FOLDER_OR_LISTING_OR_TAR", help="what to read")
    parser.add_argument("--work", type=Path, help="folder for what the stages make")
    parser.add_argument("--workers", type=int, help="processes (default: all CPUs)")
    parser.add_argument("--json", action="store_true", help="print the reports as one JSON list")
    recipe = parser.add_argument_group("with --recipe")
    recipe.add_argument("--recipe", type=Path, metavar="YAML", help="stages and their options")
    recipe.add_argument("--engine", choices=["local", "ray"], help="of the stages that map rows")
    recipe.add_argument("--only", metavar="STAGE", help="run this stage of the recipe alone")
    recipe.add_argument("--until", metavar="STAGE", help="stop after this stage")
    recipe.add_argument("--shard", metavar="I/N", help="with --only: do part I (from 0) of N")
    plain = parser.add_argument_group("without --recipe")
    plain.add_argument("--min-frames", type=int, help=f"shorter clips are dropped (default: {segment.MIN_FRAMES})")
    plain.add_argument(
        "--rules", type=Path, help=f"YAML of filter thresholds (default: {filter_stage.DEFAULT_RULES.name})"
    )
    return parser


def _recipe(arguments: argparse.Namespace) -> int:
    if arguments.shard and not arguments.only:
        raise UserError("--shard needs --only STAGE: every stage waits for all shards of the one before")
    if arguments.only and arguments.until:
        raise UserError(f"--only {arguments.only} and --until {arguments.until} exclude each other")
    common = {name: getattr(arguments, name) for name in ("workers", "engine", "shard")}
    common = {name: value for name, value in common.items() if value is not None}
    runs = run_recipe(arguments.recipe, Run(arguments.source, arguments.work, common, arguments.only, arguments.until))
    if arguments.json:
        print(json.dumps([asdict(one) for one in runs], ensure_ascii=False))
    else:
        _print_runs(runs, arguments.only)
    return exit_code(runs)


def _print_runs(runs: Sequence[StageRun], only: str | None) -> None:
    print("\n".join(stage_table(runs)))
    if not only:
        print(f"-> {runs[-1].output}; report: {Path(runs[0].output).parent / REPORT_MARKDOWN}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
