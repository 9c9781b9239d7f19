"""`megatron-video data filter`: drop clips whose tags are outside thresholds.

The thresholds are a YAML file of rules (data_prep/filter_demo.yaml is the default and explains itself). The report
says for every rule how many clips it finds fault with, and how many it was the first to drop.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.stage import (
    StageReport,
    check_output,
    fingerprint_of,
    finished_fingerprint,
    make_report,
    print_report,
    stage_parser,
    write_finished,
)
from megatron_video.cli import run_command
from megatron_video.config_io import config_dataclass, config_to_dict, load_config
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest
from megatron_video.shard_schema import file_sha256

STAGE = "filter"
DEFAULT_RULES = Path(__file__).with_name("filter_demo.yaml")
Tag = Literal[
    "width",
    "height",
    "fps",
    "crop_width",
    "crop_height",
    "border_share",
    "blur",
    "brightness",
    "saturation_mean",
    "saturation_max",
    "saturation_min",
    "motion_mean",
    "motion_max",
    "motion_min",
]


@config_dataclass
class Rule:
    """One threshold."""

    tag: Tag
    """Column of the manifest that is compared."""
    min: float | None = None
    """Smallest value that is kept."""
    max: float | None = None
    """Largest value that is kept."""
    media: Literal["all", "videos", "images"] = "all"
    """What the rule is for."""

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError(f"rule for {self.tag}: neither min nor max is given")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"rule for {self.tag}: min={self.min} is above max={self.max}")


@config_dataclass
class FilterConfig:
    """The rules of a filter, tried in this order."""

    rules: list[Rule]
    """Thresholds; the first that a clip fails is its drop reason."""


@dataclass(frozen=True)
class _Verdict:
    rule: Rule
    fails: pa.ChunkedArray
    reasons: pa.ChunkedArray


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, workers=False)
    parser.add_argument(
        "--rules", type=Path, default=DEFAULT_RULES, help=f"YAML of thresholds (default {DEFAULT_RULES})"
    )
    arguments = parser.parse_args(argv)
    print_report(run(arguments.source, arguments.out, arguments.rules), arguments.json)
    return 0


def run(manifest_in: Path, manifest_out: Path, rules: Path = DEFAULT_RULES) -> StageReport:
    """Mark the clips that fail a rule as dropped.

    Raises:
        UserError: the rules are wrong, or a clip has no value for a tag that a rule is about.
    """
    started = time.monotonic()
    check_output(manifest_in, manifest_out)
    config = load_config(FilterConfig, rules)
    table = read_manifest(manifest_in)
    kept = table["dropped_by"].is_null()
    verdicts = [_judge(table, rule, manifest_in) for rule in config.rules]
    # Of all clips that came in, so that a rule's count does not depend on the rules before it.
    failed = {_name(v.rule): pc.sum(pc.and_(v.fails, kept)).as_py() or 0 for v in verdicts}
    fingerprint = fingerprint_of(STAGE, config_to_dict(config), file_sha256(manifest_in))
    up_to_date = finished_fingerprint(manifest_out) == fingerprint
    # In order: the first rule that a clip fails is its reason.
    table = functools.reduce(_apply, verdicts, table)
    if not up_to_date:
        write_finished(table, manifest_out, fingerprint)
    details: dict[str, Any] = {f"fails {name}": count for name, count in failed.items()}
    return make_report(STAGE, table, manifest_out, table.num_rows, started, up_to_date, details)


def _judge(table: pa.Table, rule: Rule, manifest: Path) -> _Verdict:
    values = table[rule.tag].cast(pa.float64())
    concerned = _concerned(table, rule)
    _refuse_untagged(table, rule, concerned, manifest)
    low = pc.less(values, rule.min) if rule.min is not None else pa.scalar(False)
    high = pc.greater(values, rule.max) if rule.max is not None else pa.scalar(False)
    fails = pc.and_(pc.fill_null(pc.or_(low, high), False), concerned)
    # Columns, not rows: ten million clips take seconds.
    text = pc.cast(pc.round(values, 4), pa.string())
    reasons = pc.binary_join_element_wise(f"{rule.tag}: ", text, f" is outside {_bounds(rule)}", "")
    return _Verdict(rule, fails, reasons)


def _concerned(table: pa.Table, rule: Rule) -> pa.ChunkedArray:
    kept = table["dropped_by"].is_null()
    if rule.media == "all":
        return kept
    images = pc.fill_null(table["is_image"], False)
    return pc.and_(kept, images if rule.media == "images" else pc.invert(images))


def _refuse_untagged(table: pa.Table, rule: Rule, concerned: pa.ChunkedArray, manifest: Path) -> None:
    # A null would pass every comparison, and an untagged clip with it.
    untagged = table.filter(pc.and_(concerned, table[rule.tag].is_null()))
    if untagged.num_rows:
        raise UserError(
            f"{manifest}: {untagged.num_rows} clips have no {rule.tag}, such as {untagged['source'][0]}; run "
            "`megatron-video data tag` first, or restrict the rule to `media: videos`"
        )


def _apply(table: pa.Table, verdict: _Verdict) -> pa.Table:
    drops = pc.and_(verdict.fails, table["dropped_by"].is_null())
    for name, values in (("dropped_by", pa.scalar(STAGE)), ("drop_reason", verdict.reasons)):
        column = pc.if_else(drops, values, table[name])
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _name(rule: Rule) -> str:
    return f"{rule.tag} {_bounds(rule)}" + ("" if rule.media == "all" else f" ({rule.media})")


def _bounds(rule: Rule) -> str:
    low = "" if rule.min is None else f"{rule.min:g}"
    high = "" if rule.max is None else f"{rule.max:g}"
    return f"[{low}..{high}]"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
