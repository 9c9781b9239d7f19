"""What all stages share: manifest in, manifest out, in parts that survive a kill; a report of one table.

A stage that maps rows writes its output in parts of a few hundred rows beside the manifest that it is making. A run
that was stopped finds them and goes on; a run with other settings or another input starts afresh. A finished manifest
carries the fingerprint of what made it, so running the same stage again does nothing.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyarrow as pa

from data_prep.parts import Parts, Selection, TableRows, clear_parts, output_lock
from data_prep.workers import Execution, Shard, as_execution, default_workers, parallel_map, progress
from megatron_video.errors import UserError
from megatron_video.files import file_sha256
from megatron_video.manifest import (
    MANIFEST_VERSION,
    VERSION_KEY,
    Row,
    dropped,
    read_manifest,
    read_schema,
    write_manifest,
)
from megatron_video.run_lock import LockedError

Item = TypeVar("Item")

# Raised when what a stage computes changes, so that parts of an older program are not mixed in.
STAGE_VERSION = 3
# Small enough that a kill costs seconds, large enough that files are few.
PART_ROWS = 256
FINGERPRINT_KEY = "megatron_video.stage_fingerprint"
_EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class StageReport:
    """What a stage did; `reasons` and `examples` are of the rows that this stage dropped."""

    stage: str
    output: str
    rows_in: int
    kept: int
    dropped_here: int
    dropped_before: int
    seconds: float
    up_to_date: bool = False
    """Nothing had to be done."""
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Figures of this kind of stage."""


def run_rows(
    stage: str,
    manifest_in: Path,
    manifest_out: Path,
    process: Callable[[Row], list[Row]],
    settings: Mapping[str, Any],
    workers: int | Execution,
) -> StageReport:
    """Map every kept row of a manifest to one or more rows; `process` must be picklable.

    A `UserError` that `process` raises drops that row with its message and does not stop the run.
    """
    check_output(manifest_in, manifest_out)
    rows = TableRows(read_manifest(manifest_in))
    fingerprint = fingerprint_of(stage, settings, file_sha256(manifest_in))
    guarded, lost = functools.partial(_guarded, stage, process), functools.partial(lost_row, stage)
    return run_parts(stage, rows, manifest_out, guarded, fingerprint, workers, lost=lost)


def run_parts(
    stage: str,
    items: Sequence[Item],
    manifest_out: Path,
    process: Callable[[Item], list[Row]],
    fingerprint: str,
    workers: int | Execution,
    finish: Callable[[pa.Table], pa.Table] | None = None,
    lost: Callable[[Item], list[Row]] | None = None,
) -> StageReport:
    """Make `manifest_out` from `process(item)` over all items, in parts; `finish` changes the joined table.

    An item whose processing kills its worker process again and again gives `lost(item)`.

    Raises:
        UserError: another run is writing there, or the disk is full.
    """
    started = time.monotonic()
    execution = as_execution(workers)
    with output_lock(manifest_out, execution.shard):
        if finished_fingerprint(manifest_out) == fingerprint:
            return make_report(stage, read_manifest(manifest_out), manifest_out, len(items), started, up_to_date=True)
        parts = Parts(manifest_out, fingerprint, len(items), PART_ROWS, execution.shard)
        if execution.shard is None:
            clear_parts(manifest_out, keep=parts.folder)
        _make_missing(stage, items, parts, process, execution, lost)
        if execution.shard is None:
            table = _join(parts, manifest_out, fingerprint, finish)
            return make_report(stage, table, manifest_out, len(items), started)
        mine = make_report(stage, parts.read(execution.shard), manifest_out, len(items), started)
    return _join_if_last(mine, parts, manifest_out, fingerprint, finish)


def _make_missing(
    stage: str,
    items: Sequence[Item],
    parts: Parts,
    process: Callable[[Item], list[Row]],
    execution: Execution,
    lost: Callable[[Item], list[Row]] | None,
) -> None:
    missing = parts.missing(execution.shard)
    # One stream of work over all missing parts keeps the processes busy across their borders.
    todo = Selection(items, [parts.items_of(number) for number in missing])
    results: Iterator[list[Row]] = progress(parallel_map(process, todo, execution, lost), len(todo), stage)
    for number in missing:
        produced = islice(results, len(parts.items_of(number)))
        parts.write(number, [row for rows in produced for row in rows])
    # One more step lets the progress line end.
    next(results, None)


def _join(
    parts: Parts, manifest_out: Path, fingerprint: str, finish: Callable[[pa.Table], pa.Table] | None
) -> pa.Table:
    table = parts.read()
    table = finish(table).combine_chunks() if finish else table
    write_finished(table, manifest_out, fingerprint)
    # Only now that the result is there may the parts go.
    clear_parts(manifest_out)
    return table


def _join_if_last(
    mine: StageReport,
    parts: Parts,
    manifest_out: Path,
    fingerprint: str,
    finish: Callable[[pa.Table], pa.Table] | None,
) -> StageReport:
    """Of an array's tasks, the one that finds all parts there writes the manifest."""
    try:
        with output_lock(manifest_out):
            joined = finished_fingerprint(manifest_out) == fingerprint
            missing = [] if joined else parts.missing()
            if not joined and not missing:
                _join(parts, manifest_out, fingerprint, finish)
                joined = True
    except LockedError:
        # Others are at work; the last of them joins.
        joined, missing = False, parts.missing()
    return replace(mine, details={**mine.details, "joined": joined, "parts missing": f"{len(missing)} of {len(parts)}"})


def write_finished(table: pa.Table, manifest_out: Path, fingerprint: str) -> None:
    """Write a stage's result with the fingerprint by which a second run knows it."""
    write_manifest(table, manifest_out, {FINGERPRINT_KEY: fingerprint})


def stage_metadata(fingerprint: str) -> dict[str, str]:
    """What stands in the metadata of a finished manifest."""
    return {VERSION_KEY: str(MANIFEST_VERSION), FINGERPRINT_KEY: fingerprint}


def check_output(manifest_in: Path, manifest_out: Path) -> None:
    """A stage never edits its input.

    Raises:
        UserError: both are one file.
    """
    if manifest_in.resolve() == manifest_out.resolve():
        raise UserError(f"--out {manifest_out} is the input; a stage never edits its input, name another file")


def fingerprint_of(stage: str, settings: Mapping[str, Any], source: str) -> str:
    """Identity of a stage's output: its settings, its input, and the version of its code."""
    content = json.dumps([STAGE_VERSION, stage, dict(settings), source], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def finished_fingerprint(manifest: Path) -> str | None:
    """Fingerprint of an existing output; None if there is none yet.

    Raises:
        UserError: the file is no manifest, so it is not ours to overwrite.
    """
    if not manifest.exists():
        return None
    if manifest.is_dir():
        raise UserError(f"--out {manifest} is a folder; name the file, such as {manifest / 'manifest.parquet'}")
    try:
        metadata = read_schema(manifest).metadata or {}
    except UserError as error:
        raise UserError(f"--out {manifest} would overwrite a file that is not a manifest: {error}") from None
    fingerprint: bytes | None = metadata.get(FINGERPRINT_KEY.encode())
    return fingerprint.decode() if fingerprint else None


def make_report(
    stage: str,
    table: pa.Table,
    output: Path,
    rows_in: int,
    started: float,
    up_to_date: bool = False,
    details: Mapping[str, Any] | None = None,
) -> StageReport:
    """Count kept and dropped rows; reasons are grouped by what stands before their colon."""
    # A row stays with the stage that dropped it, so earlier stages' losses are visible in every report.
    by = Counter(table["dropped_by"].to_pylist())
    # Two columns: of a large folder, whole rows of what was dropped are gigabytes as Python objects.
    gone = table.filter(pa.compute.equal(table["dropped_by"], stage))
    mine = gone.select(["source", "drop_reason"]).to_pylist()
    return StageReport(
        stage=stage,
        output=str(output),
        rows_in=rows_in,
        kept=by[None],
        dropped_here=by[stage],
        dropped_before=table.num_rows - by[None] - by[stage],
        seconds=round(time.monotonic() - started, 2),
        up_to_date=up_to_date,
        reasons=dict(Counter(row["drop_reason"].split(":")[0] for row in mine)),
        examples=[_example(row) for row in mine[:_EXAMPLES_SHOWN]],
        details=dict(details or {}),
    )


def print_report(report: StageReport, as_json: bool) -> None:
    """One table on stdout, or one JSON object."""
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    state = "up to date, nothing redone" if report.up_to_date else f"{report.seconds:.1f} s"
    lines = [("rows in", report.rows_in), ("kept", report.kept), ("dropped here", report.dropped_here)]
    lines += [(f"  {reason}", count) for reason, count in sorted(report.reasons.items())]
    lines += [("dropped before", report.dropped_before), *report.details.items()]
    width = max(len(name) for name, _ in lines) + 2
    print(f"{report.stage}: {report.output} ({state})")
    print("\n".join(f"  {name:<{width}}{_plain(value)}" for name, value in lines))
    for example in report.examples:
        print(f"    dropped: {example}")


def stage_parser(
    stage: str,
    description: str | None,
    source: str = "MANIFEST",
    output: str = "MANIFEST",
    workers: bool = True,
    spread: bool = False,
    check: Callable[[argparse.Namespace], object] | None = None,
    gpu: Callable[[argparse.Namespace], object] | None = None,
) -> argparse.ArgumentParser:
    """The arguments that all stages have: --in, --out, --json, and --workers where rows are mapped.

    With `spread` come --engine and --shard, which `execution_of` reads, for stages that work through `run_parts`.
    `check` raises a UserError where options contradict each other or name what is not there; a recipe calls it before
    its first stage runs. `gpu` says whether it is worth a GPU with these options; whoever plans jobs asks it.
    """
    parser = StageParser(prog=f"megatron-video data {stage}", description=description)
    parser.gpu = gpu
    parser.checks = [*([execution_of] if spread else []), *([check] if check else [])]
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar=source, help="what to read")
    parser.add_argument("--out", type=Path, required=True, metavar=output, help="what to write")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    if workers:
        parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: all CPUs)")
    if spread:
        parser.add_argument("--engine", choices=["local", "ray"], default="local", help="local processes or Ray Data")
        parser.add_argument("--shard", metavar="I/N", help="do part I (from 0) of N; the last to end joins them")
    return parser


class _Parsed(Exception):  # noqa: N818
    """Carries a parser out of a stage's `main` before the stage runs."""


class StageParser(argparse.ArgumentParser):
    """Does as `checked_parser` says; otherwise an ordinary parser."""

    check: ContextVar[bool | None] = ContextVar("check", default=None)
    """None: parse; False: only show the parser; True: parse and show it."""
    checks: Sequence[Callable[[argparse.Namespace], object]] = ()
    gpu: Callable[[argparse.Namespace], object] | None = None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.check.get() is False:
            raise _Parsed(self)
        parsed = super().parse_args(args, namespace)
        for check in self.checks:
            check(parsed)
        if self.check.get():
            raise _Parsed(self)
        return parsed

    def error(self, message: str) -> NoReturn:
        if self.check.get() is not None:
            raise UserError(message)
        super().error(message)


def checked_parser(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None) -> argparse.ArgumentParser:
    """The parser of a stage's `main`, after it has read `argv`; nothing is run. None: `argv` is not read.

    So a recipe knows the options of every stage, and finds a wrong one before the first stage runs.

    Raises:
        UserError: what argparse or the stage's own check complains about.
    """
    token = StageParser.check.set(argv is not None)
    try:
        main(argv or [])
    except _Parsed as parsed:
        parser: argparse.ArgumentParser = parsed.args[0]
        return parser
    finally:
        StageParser.check.reset(token)
    raise TypeError(f"{main.__module__} does not make its parser with stage_parser")


def execution_of(arguments: argparse.Namespace) -> Execution:
    """How the work is spread, from the options of a `spread` stage.

    Raises:
        UserError: --shard is not I/N.
    """
    shard = Shard.parse(arguments.shard) if arguments.shard else None
    return Execution(arguments.workers, arguments.engine, shard)


def check_folder(folder: Path, option: str) -> None:
    """Before hours of work: a folder that is to be written can be.

    Raises:
        UserError: it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if error.errno == errno.EEXIST else error.strerror
        raise UserError(f"{option} {folder} cannot be made a folder: {reason}; name another") from None


def lost_row(stage: str, row: Row) -> list[Row]:
    """The row of a clip that killed every process that worked on it."""
    return [dropped(row, stage, f"crash: {row['source']} killed the processes that read it")]


def _guarded(stage: str, process: Callable[[Row], list[Row]], row: Row) -> list[Row]:
    # Dropped rows pass through untouched: the last manifest tells the fate of every clip.
    if row["dropped_by"]:
        return [row]
    try:
        return process(row)
    except UserError as error:
        return [dropped(row, stage, f"unreadable: {error}")]


def _example(row: Row) -> str:
    reason: str = row["drop_reason"]
    return reason if row["source"] in reason else f"{row['source']}: {reason}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
