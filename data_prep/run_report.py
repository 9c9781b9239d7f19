"""The report of a whole run: one table of stages, what each dropped and why, its figures and its plots."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.stage import StageReport
from megatron_video.files import write_atomically

REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
_PLOTS = (".png", ".svg")
_TABLES = (".csv", ".md")
# Fields of a stage's report that have their own place here.
_IN_THE_TABLE = {field.name for field in fields(StageReport)}


@dataclass(frozen=True)
class StageRun:
    """What one stage of a recipe did."""

    name: str
    stage: str
    output: str
    exit_code: int
    report: dict[str, Any] = field(default_factory=dict)
    """What the stage prints with --json."""
    seconds_earlier: float | None = None
    """Of the run that made the output, where this one had nothing to do."""

    @property
    def seconds(self) -> float | None:
        """What the output took to make, as far as it is known."""
        return self.report.get("seconds") if self.seconds_earlier is None else self.seconds_earlier


def write_run_report(work: Path, recipe: Path, runs: Sequence[StageRun], folders: Mapping[str, Path]) -> None:
    """Write WORK/report.md and WORK/report.json; `folders` has each stage's own plots and tables."""
    found = {run.name: _files(folders.get(run.name), Path(run.output)) for run in runs}
    written = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "recipe": str(recipe),
        "written": written,
        "stages": [{**asdict(run), "files": [str(path) for path in found[run.name]]} for run in runs],
    }
    write_atomically(work / REPORT_JSON, json.dumps(content, ensure_ascii=False, indent=1).encode())
    head = [f"# Data run of {recipe.name}", "", f"Recipe {recipe}, written {written}.", "", *stage_table(runs)]
    sections = [line for run in runs for line in _section(run, found[run.name], work)]
    write_atomically(work / REPORT_MARKDOWN, "\n".join([*head, *sections, ""]).encode())


def read_runs(work: Path) -> list[StageRun]:
    """Runs of an earlier report; none if there is none, or an unreadable one."""
    try:
        stages = json.loads((work / REPORT_JSON).read_text(encoding="utf-8"))["stages"]
        return [StageRun(**{key: value for key, value in stage.items() if key != "files"}) for stage in stages]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def stage_table(runs: Sequence[StageRun]) -> list[str]:
    """Markdown table, one line a stage."""
    head = [
        "| stage | rows in | kept | dropped here | dropped before | seconds | why, or what was counted |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    return head + [_table_line(run) for run in runs]


def _table_line(run: StageRun) -> str:
    report = run.report
    figures = [str(report.get(key, "")) for key in ("rows_in", "kept", "dropped_here", "dropped_before")]
    earlier = " (earlier)" if run.seconds_earlier is not None else ""
    seconds = "" if run.seconds is None else f"{run.seconds:.1f}{earlier}"
    why = ", ".join(f"{name} {count}" for name, count in _counts(report))
    if run.exit_code:
        why = f"**exit code {run.exit_code}** {why}"
    return "| " + " | ".join([run.name, *figures, seconds, why]) + " |"


def _counts(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Why rows were dropped; of a stage that has no rows, its own counts."""
    if "reasons" in report:
        return sorted(report["reasons"].items())
    sizes = {name: len(value) if isinstance(value, list) else value for name, value in report.items()}
    return [(name, size) for name, size in sizes.items() if isinstance(size, int) and not isinstance(size, bool)]


def _section(run: StageRun, files: Sequence[Path], work: Path) -> list[str]:
    lines = ["", f"## {run.name}", "", f"Output: `{run.output}`"]
    details = run.report.get("details", {})
    figures = {**details, **{key: value for key, value in run.report.items() if key not in _IN_THE_TABLE}}
    if figures:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in figures.items()]
    examples = run.report.get("examples", [])
    lines += ["", "Dropped, for example:", "", *(f"- {_cell(example)}" for example in examples)] if examples else []
    for path in files:
        link = f"[{path.name}]({_relative(path, work)})"
        lines += ["", f"!{link}" if path.suffix in _PLOTS else link]
    return lines


def _files(folder: Path | None, output: Path) -> list[Path]:
    """Plots and tables that a stage wrote: in its report folder, or straight in its output folder."""
    inside = folder.rglob("*") if folder and folder.is_dir() else output.glob("*") if output.is_dir() else ()
    return sorted(path for path in inside if path.suffix in (*_PLOTS, *_TABLES))


def _relative(path: Path, work: Path) -> str:
    # A blank would end a link.
    return os.path.relpath(path, work).replace(" ", "%20")


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")
