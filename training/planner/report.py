"""What a planning command found: tables and notes for a terminal, Markdown and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.planner.cluster import Cluster
from training.planner.tables import Table

_WIDTH = 120


@dataclass(frozen=True)
class Report:
    """Tables with what was assumed."""

    title: str
    """Its heading."""
    tables: Sequence[Table]
    """In order."""
    notes: Sequence[str]
    """What was assumed, and what follows, a sentence each."""
    values: dict[str, Any] = field(default_factory=dict)
    """More for JSON."""

    def text(self) -> str:
        """For a terminal."""
        notes = [textwrap.fill(note, _WIDTH, initial_indent="- ", subsequent_indent="  ") for note in self.notes]
        return "\n\n".join([self.title, *(table.text() for table in self.tables), "\n".join(notes)])

    def markdown(self) -> str:
        """As a section."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join([f"## {self.title}", *(table.markdown() for table in self.tables), notes])

    def json(self) -> str:
        """All fields; what has no value, such as an infinite time, is null."""
        tables = {table.title: list(table.rows) for table in self.tables}
        values = {"title": self.title, "tables": tables, **self.values, "assumptions": list(self.notes)}
        return json.dumps(_finite(values), indent=1, allow_nan=False)


def percent(digits: int = 1) -> Any:
    """How a share of 0 to 1 is shown."""
    return lambda value: "-" if value is None else f"{100 * value:.{digits}f}"


def optional(digits: int) -> Any:
    """How a number that may be missing is shown."""
    return lambda value: "-" if value is None else f"{value:,.{digits}f}"


def jitter_note(cluster: Cluster) -> str:
    """What is assumed of its nodes."""
    jitter = cluster.jitter
    return (
        f"jitter: every replica's own part of a step times a factor, {jitter.distribution} with mean 1 and standard "
        f"deviation {jitter.spread:g}, drawn for every step; {100 * jitter.slow_nodes:g} % of the nodes always take "
        f"{jitter.slow_factor:g} times as long (cluster.jitter: assumed, not measured)"
    )


def failure_note(cluster: Cluster) -> str:
    """What is assumed of its failures."""
    rate = cluster.failures.per_1000_gpu_days
    return (
        f"failures: {rate:g} unexpected restarts a day of 1,000 GPUs (0.095: `total unexpected` of Table 5 of arXiv "
        f"2502.10248, 7 of hardware and 11 of software), {rate / 24000:.3g} a GPU-hour, and "
        f"{cluster.failures.planned_per_1000_gpu_days:g} planned ones behind a checkpoint (4 to those 18, Table 4)"
    )


def storage_note(cluster: Cluster) -> str:
    """What is assumed of its storage."""
    storage = cluster.storage
    return (
        f"storage: {storage.read_gbps:g} GB/s read, {storage.write_gbps:g} GB/s written, at most {storage.node_gbps:g} "
        "GB/s a node (cluster.storage: assumed)"
    )


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(name): _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
