"""The matrix as a table to read: on a terminal of 120 columns, as Markdown, and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.layout_matrix.compare import TensorError
from training.layout_matrix.runner import Outcome
from training.layout_matrix.table import TOLERANCES, Dtype

DTYPE_NAMES: dict[Dtype, str] = {"float32": "fp32", "bfloat16": "bf16"}
# Quantity -> head of its column: what fits a line. In fp32 the optimizer updates the parameters themselves.
_COLUMNS: dict[Dtype, dict[str, str]] = {
    "float32": {
        "loss": "loss",
        "grad_norm": "norm",
        "gradients": "grads",
        "parameters": "params",
        "ema": "EMA",
        "telemetry": "telem.",
    },
    "bfloat16": {
        "loss": "loss",
        "grad_norm": "norm",
        "gradients": "grads",
        "parameters": "params",
        "main_parameters": "fp32 p.",
        "ema": "EMA",
    },
}
_WIDTH, _LONGEST_TENSOR = 120, 30


@dataclass
class FinishedReport:
    """What a mode of the command found: printed, and written as Markdown or JSON."""

    title: str
    heading: str
    summary: str
    values: list[dict[str, Any]]
    """For JSON."""
    tables: list[tuple[str, str, str]] = field(default_factory=list)
    """(title, text, Markdown)."""
    wrong: bool = False

    def add(self, title: str, text: str, markdown: str) -> None:
        """One more table."""
        self.tables.append((title, text, markdown))

    def json(self) -> str:
        """All of it as JSON; an infinite error is null."""
        return json.dumps(_finite({"heading": self.heading, "rows": self.values}), indent=1, allow_nan=False)

    def markdown(self) -> str:
        """All of it as a page."""
        tables = [f"## {title}\n\n{markdown}" for title, _, markdown in self.tables]
        return "\n\n".join([f"# {self.title}", self.heading, *tables, self.summary])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; those of numbers are right-aligned."""
    columns = [_aligned(list(column)) for column in zip(header, *rows, strict=True)]
    lines = [" ".join(line) for line in zip(*columns, strict=True)]
    lines.insert(1, " ".join("-" * len(column[0]) for column in columns))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def matrix_table(outcomes: Sequence[Outcome], dtype: Dtype, markdown: bool = False) -> str:
    """All rows of one dtype, with the limits as the last row."""
    columns = _COLUMNS[dtype]
    header = ["layout", "ranks", *columns.values(), "worst param.", "s", ""]
    shown = [outcome for outcome in outcomes if outcome.dtype == dtype]
    # Beside the name: ranks, seconds and verdict take 20 columns, an error 8.
    room = _WIDTH - 20 - 8 * len(columns) - max(len(outcome.case.name) for outcome in shown)
    rows = [_cells(outcome, None if markdown else min(room, _LONGEST_TENSOR)) for outcome in shown]
    limits = [f"{getattr(TOLERANCES[dtype], name):.0e}" for name in columns]
    table = markdown_table if markdown else text_table
    return table(header, [*rows, ["largest allowed", "", *limits, "", "", ""]])


def progress_line(outcome: Outcome, number: int, count: int, name_width: int) -> str:
    """One line as a layout ends."""
    worst = "" if outcome.errors is None else f"largest error {_largest(outcome):.1e}"
    return (
        f"[{number:3}/{count}] {DTYPE_NAMES[outcome.dtype]} {outcome.case.name:<{name_width}} "
        f"{_ranks(outcome.case.ranks):<8} {worst:<22} {outcome.seconds:5.1f} s  {_verdict(outcome)}"
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many agree, then what is wrong with each that does not."""
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [f"{len(outcomes) - len(wrong)} of {len(outcomes)} agree with one process ({seconds:.0f} s)"]
    for outcome in wrong:
        lines.append(f"{outcome.case.name} in {DTYPE_NAMES[outcome.dtype]}:")
        lines += [f"  {line}" for line in _faults(outcome)]
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every row with all its figures."""
    return [
        {
            "layout": outcome.case.name,
            "parallel": outcome.case.parallel,
            "data_parallel_size": outcome.case.data_parallel_size,
            "ranks": outcome.case.ranks,
            "dtype": DTYPE_NAMES[outcome.dtype],
            "seconds": round(outcome.seconds, 2),
            "errors": None if outcome.errors is None else asdict(outcome.errors),
            "tolerance": asdict(TOLERANCES[outcome.dtype]),
            "wrong": outcome.wrong,
            "failure": outcome.failure,
        }
        for outcome in outcomes
    ]


def failure_lines(failure: str) -> list[str]:
    """The end of what the rank that failed first said; the others mostly lost their connection to it."""
    first = re.split(r"\n(?=rank \d+: )", failure.strip())[0]
    lines = first.splitlines()
    return lines if len(lines) <= 12 else [lines[0], *lines[-11:]]


def short_name(tensor: str, width: int) -> str:
    """A parameter's name without what all share, cut at the front to `width`."""
    name = tensor.removeprefix("layers.").removesuffix(".weight")
    return name if len(name) <= width else "…" + name[1 - width :]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(outcome: Outcome, tensor_width: int | None) -> list[str]:
    errors, columns = outcome.errors, _COLUMNS[outcome.dtype]
    if errors is None:
        values, worst = ["-"] * len(columns), "-"
    else:
        values = [f"{errors.value(name):.1e}" for name in columns]
        name = errors.parameters.name
        worst = name if tensor_width is None else short_name(name, tensor_width)
    return [outcome.case.name, str(outcome.case.ranks), *values, worst, f"{outcome.seconds:.1f}", _verdict(outcome)]


def _faults(outcome: Outcome) -> list[str]:
    errors = outcome.errors
    if errors is None:
        return failure_lines(outcome.failure)
    lines = []
    for quantity in outcome.wrong:
        if quantity == "unequal copies":
            lines += [f"copies differ between ranks: {name}" for name in errors.unequal_copies[:3]]
            continue
        found = getattr(errors, quantity)
        where = f" in {found.name}" if isinstance(found, TensorError) else ""
        limit = getattr(TOLERANCES[outcome.dtype], quantity)
        lines.append(f"{quantity}: {errors.value(quantity):.1e}{where}, allowed {limit:.0e}")
    return lines


def _largest(outcome: Outcome) -> float:
    assert outcome.errors is not None
    return max(outcome.errors.value(name) for name in _COLUMNS[outcome.dtype])


def _verdict(outcome: Outcome) -> str:
    if outcome.errors is None:
        return "FAILED"
    return "ABOVE" if outcome.wrong else "ok"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _aligned(column: list[str]) -> list[str]:
    width = max(map(len, column))
    numbers = all(cell.lstrip("-")[:1].isdigit() or cell in ("", "-", "inf", "fail") for cell in column[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in column]
