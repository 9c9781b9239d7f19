"""The verdict of a dry run as text, as JSON, and what every rank holds as CSV."""

from __future__ import annotations

import csv
import json
import resource
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_video.errors import BAD_INPUT_EXIT_CODE, UserError
from training.dry_run.findings import Findings
from training.dry_run.job_views import AXES, layers_text, span
from training.dry_run.request import Request
from training.dry_run.stage_run import StageReport
from training.layout_matrix.report import text_table
from training.planner.cluster import GIB
from training.planner.plan import describe
from training.planner.show import show_job, show_plan

_SIZES = ("weights", "gradients", "optimizer", "ema", "model_state")
_WIDTH = 120


@dataclass
class Clock:
    """What the dry run itself took."""

    started: float = field(default_factory=time.perf_counter)

    def values(self) -> dict[str, float]:
        """Up to now; CPU seconds and memory of the whole process, its imports too."""
        return {
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time(),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


@dataclass
class Report:
    """All that a dry run found."""

    command: str
    """Whose it is."""
    request: Request | None
    """None where the options make no sense."""
    findings: list[Findings]
    """Of the options, of every stage, and of all together."""
    stages: list[StageReport] = field(default_factory=list)
    """Whose configuration could be read."""
    other: dict[str, Any] = field(default_factory=dict)
    """What a trainer of another kind adds, for JSON."""
    lines: list[str] = field(default_factory=list)
    """The same for readers."""
    clock: Clock = field(default_factory=Clock)

    @property
    def problems(self) -> list[str]:
        """Why the job could not run."""
        return [problem for findings in self.findings for problem in findings.problems]

    @property
    def not_checked(self) -> list[str]:
        """What nobody looked at."""
        return [text for findings in self.findings for text in findings.not_checked]

    def values(self) -> dict[str, Any]:
        """For JSON; `ok` and `problems` are always there."""
        request = self.request
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "not_checked": self.not_checked,
            "notes": [note for findings in self.findings for note in findings.notes],
            "command": self.command,
            "gpus": request.world_size if request else None,
            "gpu": request.cluster.gpu if request and request.cluster else None,
            **self.clock.values(),
            "stages": [stage.values() for stage in self.stages],
            **self.other,
        }

    def text(self) -> str:
        """For a terminal."""
        parts = [self._head(), *(stage_text(stage) for stage in self.stages), *self.lines]
        for title, items in (
            ("good to know", [note for findings in self.findings for note in findings.notes]),
            ("NOT checked", self.not_checked),
            (f"{len(self.problems)} PROBLEM{'S' if len(self.problems) > 1 else ''}", self.problems),
        ):
            if items:
                parts.append("\n".join([f"{title}:", *(f"  - {item}" for item in items)]))
        took = self.clock.values()
        verdict = "it can run" if not self.problems else "it could NOT run"
        left_out = ", as far as was checked" if self.not_checked and not self.problems else ""
        parts.append(
            f"{verdict}{left_out}; looked at in {took['seconds']:.1f} s ({took['cpu_seconds']:.1f} s of CPU, "
            f"{took['peak_rss_mib']:,.0f} MiB)"
        )
        return "\n\n".join(parts)

    def tell(self, as_json: bool) -> int:
        """Print it.

        Returns:
            The exit code: 0, or 2 if the job could not run.

        Raises:
            UserError: the file of all ranks cannot be written.
        """
        print(json.dumps(self.values(), indent=1) if as_json else self.text(), flush=True)
        # Who reads JSON may still show its user what the command itself says.
        for problem in self.problems if as_json else ():
            print(f"error: {problem}", file=sys.stderr)
        if self.request is not None and self.request.ranks_file is not None:
            write_ranks(self.stages, self.request.ranks_file)
        return BAD_INPUT_EXIT_CODE if self.problems else 0

    def _head(self) -> str:
        request = self.request
        if request is None:
            return f"dry run of {self.command}: nothing was started"
        where = f"{request.cluster.gpu} GPUs" if request.cluster is not None else "ranks"
        return f"dry run of {self.command} on {request.world_size:,} {where}: nothing was started, nothing written"


def stage_text(stage: StageReport) -> str:
    """A run: its layout, views, memory, time and verdicts."""
    config, views = stage.config, stage.views
    name = stage.findings.stage or config.run.stage
    lines = [f"== {name}: {config.run.output_dir}, {config.training.steps:,} steps, {describe(config.parallel)}"]
    if stage.start is not None:
        lines.append(f"starts from: {stage.start.origin}")
    if views is not None:
        pieces = views.grid.shape
        lines.append(
            f"views: {views.built} built, which stand for {views.world_size:,} ranks = PP {pieces[0]} x DP {pieces[1]} "
            f"x CP {pieces[2]} x TP {pieces[3]}: one for each pair of pipeline and tensor-parallel place"
            f"{', and of each stage that of the last replica' if views.last else ''}"
        )
        lines.append(_rank_table(stage))
    if stage.disk is not None:
        disk = stage.disk
        lines.append(
            f"checkpoints: {disk.checkpoint_bytes / 1e9:,.3f} GB each, {disk.count} at most at a time; "
            f"{disk.present_bytes / 1e9:,.3f} GB are there"
        )
    checks = ", ".join(f"{check} {verdict}" for check, verdict in stage.findings.checks.items())
    lines.append(textwrap.fill(f"checks: {checks}", _WIDTH))
    planned = [] if stage.plan is None else [show_job(stage.plan), show_plan(stage.plan)]
    return "\n\n".join(["\n".join(lines), *planned])


def write_ranks(stages: Sequence[StageReport], path: Path) -> None:
    """Every rank's place, groups, layers and sizes, one line each.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [row for stage in stages for row in rank_lines(stage)]
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--ranks {path} cannot be written: {error.strerror}") from None


def rank_lines(stage: StageReport) -> list[dict[str, Any]]:
    """One for every rank; sizes in bytes."""
    views = stage.views
    if views is None:
        return []
    rows = []
    for facts in views.ranks:
        at = facts.coordinates
        rows.append(
            {
                "stage": stage.findings.stage or stage.config.run.stage,
                "rank": facts.rank,
                **asdict(at),
                "layers": layers_text(facts.layers),
                "parameters": facts.parameters,
                **{f"{name}_bytes": getattr(facts, name) for name in _SIZES},
                "micro_batches": stage.micro_batches[at.dp] if stage.micro_batches else "",
                **{f"{axis}_group": span(views.group(axis, at)) for axis in AXES},
            }
        )
    return rows


def _rank_table(stage: StageReport) -> str:
    rows = [
        [
            str(row["pipeline_stage"]),
            f"{row['ranks']:,}",
            row["layers"],
            _least_to_most(row["parameters"], 1e9, 3),
            *(_least_to_most(row[name], GIB, 3) for name in _SIZES),
            _least_to_most(row["micro_batches"], 1, 0) if row["micro_batches"] else "?",
        ]
        for row in stage.rank_rows()
    ]
    names = ["stage", "ranks", "layers", "10^9 parameters", *(name.replace("_", " ") for name in _SIZES)]
    samples = "" if stage.findings.checks.get("data") == "ok" else " (no data: of samples drawn alike)"
    note = f"GiB of one rank, least-most over all of them; micro-batches of one replica in the first step{samples}"
    return f"{text_table([*names, 'micro-batches'], rows)}\n{note}"


def _least_to_most(pair: Sequence[float], unit: float, digits: int) -> str:
    least, most = (f"{value / unit:,.{digits}f}" for value in pair)
    return least if least == most else f"{least}-{most}"
