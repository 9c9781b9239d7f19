"""The planner's figures beside those of others, as rows: for a terminal, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from training.layout_matrix.report import markdown_table, text_table
from training.planner import published, table2
from training.planner.claims import claims
from training.planner.cluster import GIB, Cluster
from training.planner.memory import peak_memory
from training.planner.step_time import step_seconds

Formats = Mapping[str, Callable[[Any], str]]


@dataclass(frozen=True)
class Table:
    """Rows of equal fields."""

    title: str
    """Its heading."""
    rows: Sequence[Mapping[str, Any]]
    """Field -> value."""
    formats: Formats
    """Fields that are shown, in order, under their names, and how."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Other heads of columns."""

    def text(self) -> str:
        """Aligned columns."""
        return f"{self.title}\n{text_table(*self._cells())}"

    def markdown(self) -> str:
        """As Markdown."""
        return f"### {self.title}\n\n{markdown_table(*self._cells())}"

    def json(self) -> str:
        """All fields of all rows."""
        return json.dumps({"title": self.title, "rows": list(self.rows)}, indent=1)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = [[form(row[name]) for name, form in self.formats.items()] for row in self.rows]
        return [self.heads.get(name, name.replace("_", " ")) for name in self.formats], rows


def number(digits: int) -> Callable[[float], str]:
    """How a number with so many digits behind the point is shown."""
    return lambda value: f"{value:,.{digits}f}"


def signed(digits: int) -> Callable[[float], str]:
    """The same with its sign."""
    return lambda value: f"{value:+.{digits}f}"


def table_2(cluster: Cluster | None = None) -> Table:
    """The nine rows of the paper's Table 2: its emulator's MFU, and the planner's MFU and memory."""
    cluster = cluster or table2.table_2_cluster()
    rows = []
    for row in table2.ROWS:
        job = row.job(cluster)
        seconds = step_seconds(job)
        mfu = 100 * job.mfu(seconds.total)
        memory = max(stage.model_state + stage.activations for stage in peak_memory(job))
        rows.append(
            {
                "layout": row.name,
                "recomputed_percent": row.recomputed_percent,
                "paper_mfu": row.mfu_percent,
                "planner_mfu": mfu,
                "residual": mfu - row.mfu_percent,
                "fitted": row.fits,
                "state_and_activations_gib": memory / GIB,
                "seconds": seconds.by_part(),
            }
        )
    formats: Formats = {
        "layout": str,
        "recomputed_percent": number(2),
        "paper_mfu": number(2),
        "planner_mfu": number(2),
        "residual": signed(2),
        "fitted": str,
        "state_and_activations_gib": number(1),
    }
    return Table("Table 2 of arXiv 2502.10248: MFU in percent", rows, formats)


def published_speeds() -> Table:
    """TFLOP/s that others published."""
    rows = []
    for row in published.ROWS:
        predicted = row.predicted()
        rows.append(
            {
                "run": row.name,
                "gpus": row.gpus,
                "published_tflops": row.tflops,
                "planner_tflops": predicted,
                "residual_percent": 100 * (predicted / row.tflops - 1),
                "fitted": row.fits,
                "within_10_percent": abs(predicted / row.tflops - 1) <= 0.1,
                "source": row.source,
                "remark": row.remark,
            }
        )
    formats: Formats = {
        "run": str,
        "gpus": str,
        "published_tflops": number(1),
        "planner_tflops": number(1),
        "residual_percent": signed(1),
        "fitted": str,
    }
    return Table("Published model TFLOP/s of one GPU", rows, formats)


def paper_claims(cluster: Cluster | None = None) -> Table:
    """What the paper says in its text."""
    found = claims(cluster or table2.table_2_cluster())
    formats: Formats = {"what": str, "paper": str, "planner": number(1), "unit": str}
    return Table("Figures in the text of arXiv 2502.10248, 6.2.2", [asdict(claim) for claim in found], formats)
