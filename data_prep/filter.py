"""`megatron-video data filter`: drop clips whose tags are outside thresholds, and sort the rest into named subsets.

The thresholds are a YAML file of rules (data_prep/filter_demo.yaml is the default and explains itself;
data_prep/filter_paper.yaml has the paper's six subsets). One pass fills the column `subset`: the strictest subset that
a clip is in. Clips outside the subset that --subset names are dropped. The table printed says for every rule how many
clips it finds fault with and how many it was the first to drop; --report adds it as CSV, with plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.filter_report import Histograms, print_removed, write_report
from data_prep.filter_rules import FilterConfig, chosen_level, columns_of, load_rules, steps_of
from data_prep.filter_verdicts import STAGE, VERDICTS, Tally, judge
from data_prep.manifest_stream import iter_manifest
from data_prep.parquet_columns import replace_columns
from data_prep.parts import output_lock
from data_prep.stage import (
    StageReport,
    check_folder,
    check_output,
    fingerprint_of,
    finished_fingerprint,
    print_report,
    stage_metadata,
    stage_parser,
)
from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict
from megatron_video.files import appearing, file_sha256

DEFAULT_RULES = Path(__file__).with_name("filter_demo.yaml")


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, workers=False, check=_checked_rules)
    parser.add_argument(
        "--rules", type=Path, default=DEFAULT_RULES, help=f"YAML of thresholds (default: {DEFAULT_RULES.name})"
    )
    parser.add_argument("--subset", metavar="NAME", help="clips outside it are dropped (default: the widest subset)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write table and plots of what was removed")
    parser.add_argument("--dry-run", action="store_true", help="report only; --out is not written")
    arguments = parser.parse_args(argv)
    report = run(
        arguments.source, arguments.out, arguments.rules, arguments.subset, arguments.report, arguments.dry_run
    )
    if arguments.json:
        print_report(report, as_json=True)
    else:
        # The table says of the rules what their lines would, and more.
        chosen = {"subset": report.details["subset"]} if "subset" in report.details else {}
        print_report(replace(report, details=chosen), as_json=False)
        print_removed(report)
    return 0


def run(
    manifest_in: Path,
    manifest_out: Path,
    rules: Path = DEFAULT_RULES,
    subset: str | None = None,
    report_folder: Path | None = None,
    dry_run: bool = False,
) -> StageReport:
    """Mark the clips that fail a rule as dropped, and name the subset of the others.

    Args:
        subset: clips that are not in it are dropped; None: the widest.
        report_folder: where table and plots go; None: neither.
        dry_run: read the tags only and write no manifest.

    Raises:
        UserError: the rules are wrong, or a clip has no value for a tag that a rule is about.
    """
    started = time.monotonic()
    check_output(manifest_in, manifest_out)
    if report_folder:
        check_folder(report_folder, "--report")
    config = load_rules(rules)
    steps, cut = steps_of(config), chosen_level(config, subset)
    tally = Tally(steps, [entry.name for entry in config.subsets])
    histograms = Histograms.of(manifest_in, steps) if report_folder else None
    if dry_run:
        _judge_only(manifest_in, cut, tally, histograms)
        up_to_date = False
    else:
        with output_lock(manifest_out):
            up_to_date = _write(manifest_in, manifest_out, config, subset, cut, tally, histograms)
    report = _report(tally, manifest_out, started, up_to_date, subset if subset or not cut else config.subsets[0].name)
    if report_folder and histograms:
        write_report(report_folder, tally, histograms)
    return report


def _checked_rules(arguments: argparse.Namespace) -> None:
    chosen_level(load_rules(arguments.rules), arguments.subset)


def _write(
    manifest_in: Path,
    manifest_out: Path,
    config: FilterConfig,
    subset: str | None,
    cut: int,
    tally: Tally,
    histograms: Histograms | None,
) -> bool:
    """Write the output; True if it was there already."""
    settings = {"config": config_to_dict(config), "subset": subset}
    fingerprint = fingerprint_of(STAGE, settings, file_sha256(manifest_in))
    if finished_fingerprint(manifest_out) == fingerprint:
        _judge_only(manifest_in, cut, tally, histograms)
        return True
    verdicts = _verdicts(manifest_in, cut, tally, histograms, VERDICTS.names)
    with appearing(manifest_out) as temporary:
        replace_columns(manifest_in, temporary, VERDICTS, verdicts, stage_metadata(fingerprint))
    return False


def _judge_only(manifest_in: Path, cut: int, tally: Tally, histograms: Histograms | None) -> None:
    for _ in _verdicts(manifest_in, cut, tally, histograms, ()):
        pass


def _verdicts(
    manifest_in: Path, cut: int, tally: Tally, histograms: Histograms | None, earlier: Sequence[str]
) -> Iterator[pa.Table]:
    """The columns that a filter fills, piece by piece; `earlier` are the columns of those that are kept as they are."""
    # No others are read: of ten million clips, captions and paths take most of the time.
    for table in iter_manifest(manifest_in, sorted({*columns_of(tally.steps), *earlier})):
        if histograms:
            histograms.add(table)
        yield judge(table, tally.steps, cut, tally)


def _report(tally: Tally, output: Path, started: float, up_to_date: bool, subset: str | None) -> StageReport:
    left = tally.entered
    removed = []
    for step in tally.steps:
        left -= tally.removed[step.name]
        counts = {"fails": tally.fails[step.name], "removed": tally.removed[step.name], "left": left}
        removed.append({"subset": step.subset, "rule": step.rule.name, **counts})
    details: dict[str, Any] = {f"fails {step.name}": tally.fails[step.name] for step in tally.steps}
    return StageReport(
        stage=STAGE,
        output=str(output),
        rows_in=tally.rows,
        kept=tally.kept,
        dropped_here=tally.entered - tally.kept,
        dropped_before=tally.dropped_before,
        seconds=round(time.monotonic() - started, 2),
        up_to_date=up_to_date,
        reasons=dict(tally.reasons),
        examples=tally.examples,
        details=details | {"removed": removed} | ({"subset": subset} if subset else {}),
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
