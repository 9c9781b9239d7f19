"""`megatron-video data run`: ingest, segment, tag and filter in one go, each into its own manifest under --work.

The last one, WORK/filtered.parquet, is what encode reads. A stopped run goes on where it was.
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
from data_prep.stage import StageReport
from data_prep.workers import default_workers
from megatron_video.cli import run_command

RESULT = "filtered.parquet"


def main(argv: Sequence[str]) -> int:
    """Command line of the whole chain."""
    parser = argparse.ArgumentParser(prog="megatron-video data run", description=__doc__)
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="FOLDER_OR_LISTING")
    parser.add_argument("--work", type=Path, required=True, help="folder for the manifests")
    parser.add_argument("--min-frames", type=int, default=segment.MIN_FRAMES, help="shorter clips are dropped")
    parser.add_argument("--rules", type=Path, default=filter_stage.DEFAULT_RULES, help="YAML of filter thresholds")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: all CPUs)")
    parser.add_argument("--json", action="store_true", help="print the reports as one JSON list")
    arguments = parser.parse_args(argv)
    reports = run(arguments.source, arguments.work, arguments.min_frames, arguments.rules, arguments.workers)
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
    workers: int = 1,
) -> list[StageReport]:
    """Reports of the four stages; the result is `work`/filtered.parquet."""
    names = ("ingested.parquet", "segmented.parquet", "tagged.parquet", RESULT)
    ingested, segmented, tagged, filtered = (work / name for name in names)
    return [
        ingest.run(source, ingested, workers),
        segment.run(ingested, segmented, min_frames, workers=workers),
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


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
