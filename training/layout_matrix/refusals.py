"""The refusal table: every kind of layout that cannot work, an example, and what a user is told."""

from __future__ import annotations

import textwrap

from megatron_video.layout_rules import refusal_table
from training.layout_matrix.report import FinishedReport, markdown_table

_WIDTH = 116


def refusals_report() -> FinishedReport:
    """Tries the example of every rule, and shows the answer.

    Raises:
        AssertionError: an example that is not refused.
    """
    rows = [(rule.name, _as_text(dict(example)), message) for rule, example, message in refusal_table()]
    values = [{"rule": name, "example": example, "message": message} for name, example, message in rows]
    text = "\n".join(
        f"{name}: {example}\n{textwrap.fill(message, _WIDTH, initial_indent='    ', subsequent_indent='    ')}"
        for name, example, message in rows
    )
    report = FinishedReport("Refused layouts", "", f"{len(rows)} kinds of layout are refused", values)
    report.add("What cannot work", text, markdown_table(["kind", "example", "answer"], rows))
    return report


def _as_text(change: dict[str, object]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in change.items())
