"""`megatron-video slurm nodes`: what preflight measured of every node over time, the worst first.

A node's score in a figure is the median of its newest values; its drift is how many robust standard deviations that
lies on the bad side of all nodes' medians. Beyond -3 it is worth a look before it fails.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from megatron_video.errors import UserError
from slurm import node_scores
from slurm.job import SLURM_FOLDER
from slurm.profile import load_profile
from slurm.submission import PROFILE_VARIABLE


@dataclass(frozen=True)
class Figure:
    """A measured figure in the ranking."""

    column: str
    sign: int
    """1 where more is better, -1 where less is."""
    share: float = 0.01
    """Spread of its values on one sound node, as a share of the median: differences below it mean nothing."""
    noise: float = 0.0
    """The same in the figure's unit."""


FIGURES = {
    "gemm_tflops": Figure("products TFLOP/s", 1),
    "allreduce_gb_s": Figure("all-reduce GB/s", 1, 0.02),
    # Disks are shared, with other jobs at least.
    "local_write": Figure("local write MB/s", 1, 0.2),
    "local_read": Figure("local read MB/s", 1, 0.2),
    "shared_write": Figure("shared write MB/s", 1, 0.2),
    "shared_read": Figure("shared read MB/s", 1, 0.2),
    "visible_seconds": Figure("file seen s", -1, noise=0.2),
    "skew_seconds": Figure("clock s", -1, noise=0.05),
    "free_memory_gib": Figure("memory GiB", 1, noise=1.0),
    "remapped_rows": Figure("remapped rows", -1, noise=0.3),
}
SLOW = -3.0


@dataclass
class Score:
    """One node in one figure."""

    median: float
    last: float
    values: int
    drift: float
    """Robust z-score against all nodes, negative where it is worse."""


@dataclass
class Standing:
    """One node."""

    node: str
    checked: int
    """Starts that it was checked for."""
    refused: int
    last_refusal: str | None
    """Check of the newest refusal."""
    last_time: float
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """The figure that lies farthest on the bad side."""
        return min(self.scores, key=lambda name: self.scores[name].drift, default=None)

    @property
    def drift(self) -> float:
        """Of the worst figure."""
        return self.scores[self.worst].drift if self.worst else 0.0


def main(argv: Sequence[str]) -> int:
    """Print the ranking; 0."""
    arguments = _parse(argv)
    standings = rank(node_scores.read(_folder(arguments)), arguments.last)
    if arguments.json:
        print(json.dumps([{**asdict(s), "worst": s.worst, "drift": s.drift} for s in standings], indent=2))
    else:
        print(format_table(standings))
    return 0


def rank(history: Mapping[str, Sequence[node_scores.Entry]], last: int) -> list[Standing]:
    """Standings of all nodes, the worst drift first; of equal ones, the more often refused."""
    standings = {name: _standing(name, entries) for name, entries in history.items() if entries}
    for figure, known in FIGURES.items():
        values = {name: node_scores.series(history[name], figure, last) for name in standings}
        medians = {name: median(series) for name, series in values.items() if series}
        for name, z in node_scores.robust_z(medians, known.share, known.noise).items():
            series = values[name]
            standings[name].scores[figure] = Score(medians[name], series[-1], len(series), round(known.sign * z, 2))
    return sorted(standings.values(), key=lambda standing: (standing.drift, -standing.refused, standing.node))


def format_table(standings: Sequence[Standing]) -> str:
    """The ranking for people: a line a node, its worst figure, and the two that cost most time."""
    header = [
        "node",
        "checked",
        "refused",
        "worst figure",
        "median",
        "last",
        "drift",
        "products",
        "all-reduce",
        "last check",
    ]
    rows = [header, *(_row(standing) for standing in standings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    slow = [standing.node for standing in standings if standing.drift <= SLOW]
    if slow:
        lines += ["", f"worth a look: {', '.join(slow)} ({SLOW:g} or more standard deviations worse than the others)"]
    return "\n".join(lines)


def _standing(name: str, entries: Sequence[node_scores.Entry]) -> Standing:
    refusals = [entry["bad"] for entry in entries if entry.get("bad")]
    return Standing(name, len(entries), len(refusals), refusals[-1] if refusals else None, entries[-1]["time"])


def _row(standing: Standing) -> list[str]:
    worst = standing.scores.get(standing.worst or "")
    refused = f"{standing.refused} ({standing.last_refusal})" if standing.refused else "0"
    figures = [
        FIGURES[standing.worst].column if standing.worst else "-",
        *((f"{worst.median:.4g}", f"{worst.last:.4g}", f"{worst.drift:+.1f}") if worst else ("-", "-", "-")),
    ]
    costly = [_cell(standing.scores.get(figure)) for figure in ("gemm_tflops", "allreduce_gb_s")]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(standing.last_time))
    return [standing.node, str(standing.checked), refused, *figures, *costly, when]


def _cell(score: Score | None) -> str:
    return f"{score.median:.4g}" if score else "-"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video slurm nodes", description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run", type=Path, help="folder of a run: what its own starts measured")
    where.add_argument("--scores", type=Path, help="folder of scores, as the profile's preflight.scores names it")
    parser.add_argument(
        "--profile",
        default=os.environ.get(PROFILE_VARIABLE),
        help=f"cluster profile whose preflight.scores to read (default: ${PROFILE_VARIABLE})",
    )
    parser.add_argument(
        "--last", type=int, default=10, help="newest values of a node that count (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print every figure of every node as JSON")
    return parser.parse_args(argv)


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.last < 1:
        raise UserError(f"--last {arguments.last} must be at least 1")
    folder = arguments.scores or (arguments.run / SLURM_FOLDER / node_scores.FOLDER if arguments.run else None)
    if folder is None:
        if arguments.profile is None:
            raise UserError("whose scores? give --run RUN, --scores FOLDER, or --profile PROFILE")
        scores = load_profile(arguments.profile).preflight.scores
        if scores is None:
            raise UserError(f"profile {arguments.profile} keeps no scores (preflight.scores is null); give --run RUN")
        folder = Path(scores)
    if not any(folder.glob("*.jsonl")):
        raise UserError(f"{folder}: no scores of nodes there; preflight writes them when a job starts")
    return folder
