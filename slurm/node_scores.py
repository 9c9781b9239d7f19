"""What preflight measured of every node, start for start: RUN/slurm/node_scores/NODE.jsonl, and the cluster's folder.

One file a node: a node serves one job at a time, so no two writers meet. A slow node shows in them before it fails.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from slurm.job import Job
from slurm.preflight_checks import BadNode
from slurm.profile import ClusterProfile

FOLDER = "node_scores"
# 1 / the 75th percentile of a standard normal: makes the median absolute deviation a standard deviation.
_MAD_TO_SIGMA = 1.4826

Entry = dict[str, Any]


def append(job: Job, profile: ClusterProfile, figures: Mapping[str, Mapping[str, Any]], bad: Sequence[BadNode]) -> None:
    """Add one line to the file of each node; where a folder cannot be written to, say so and go on."""
    checks = {finding.name: finding.check for finding in bad}
    folders = [job.slurm_dir / FOLDER, *([Path(profile.preflight.scores)] if profile.preflight.scores else [])]
    for name in sorted({*figures, *checks}):
        entry = {
            "time": round(time.time(), 3),
            "node": name,
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "run": str(job.run_dir),
            "bad": checks.get(name),
            "figures": numbers(figures.get(name, {})),
        }
        for folder in folders:
            _append_line(folder / f"{name}.jsonl", entry)


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are numbers, rounded to what they mean."""
    return {
        name: float(f"{value:.6g}")
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def read(folder: Path) -> dict[str, list[Entry]]:
    """Node -> its entries, oldest first; a line that a full disk cut off is passed over."""
    return {path.stem: _entries(path) for path in sorted(folder.glob("*.jsonl"))}


def series(entries: Sequence[Entry], figure: str, last: int) -> list[float]:
    """The newest `last` values of a figure, oldest first."""
    return [entry["figures"][figure] for entry in entries if figure in entry["figures"]][-last:]


def robust_z(values: Mapping[str, float], share: float = 0.01, noise: float = 0.0) -> dict[str, float]:
    """How many standard deviations each node lies from the fleet's median, by the median absolute deviation.

    One or two bad nodes move neither (Iglewicz and Hoaglin, 1993). Of fewer than three nodes nothing can be said:
    zeros.

    Args:
        share: a standard deviation that any measurement has, however alike the nodes are, as a share of the median.
        noise: the same in the figure's unit.
    """
    if len(values) < 3:
        return dict.fromkeys(values, 0.0)
    middle = median(values.values())
    spread = _MAD_TO_SIGMA * median(abs(value - middle) for value in values.values())
    unit = max(spread, share * abs(middle), noise) or 1.0
    return {name: (value - middle) / unit for name, value in values.items()}


def _entries(path: Path) -> list[Entry]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("figures"), dict):
            found.append(entry)
    return found


def _append_line(path: Path, entry: Entry) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        print(f"preflight: scores are not kept: {path}: {error.strerror or error}", file=sys.stderr, flush=True)
