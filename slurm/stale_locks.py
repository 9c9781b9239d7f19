"""Locks that a chain's own lost tasks left on outputs.

A lock of megatron_video.run_lock goes with its process, but of a holder on another host nobody can know whether it
still runs. Here it can be known: SLURM says whether the job is over, and the results say where and when it ran.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.results import Result

# Between the clocks of a cluster's nodes.
_SKEW_SECONDS = 60.0


@dataclass(frozen=True)
class _Holder:
    host: str
    since: float


def free_stale_locks(paths: Sequence[Path], attempts: Sequence[Result], is_over: Callable[[Result], bool]) -> list[str]:
    """Remove the locks that were taken during attempts that are over, on hosts where none goes on; a line for each.

    Args:
        paths: lock files, which need not be there.
        attempts: the newest of every unit of the chain.
        is_over: whether the job of an attempt that left no word has ended.
    """
    lines = []
    for path in paths:
        holder = _read(path)
        if holder is None:
            continue
        there = [attempt for attempt in attempts if attempt.host == holder.host]
        ended = [attempt for attempt in there if attempt.state != "running" or is_over(attempt)]
        if len(ended) == len(there) and any(_during(holder, attempt) for attempt in ended):
            path.unlink(missing_ok=True)
            lines.append(f"{path}: removed; it was held on {holder.host} by a task of this chain that is over")
    return lines


def all_results(chain_folder: Path) -> list[Result]:
    """The newest result of every unit of a chain's stages."""
    found = []
    for path in chain_folder.glob("*/results/*.json"):
        try:
            found.append(Result(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return found


def _read(path: Path) -> _Holder | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return _Holder(values["host"], datetime.fromisoformat(values["since"]).timestamp())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _during(holder: _Holder, attempt: Result) -> bool:
    begun = attempt.started - _SKEW_SECONDS
    if attempt.state == "running":
        return holder.since >= begun
    return begun <= holder.since <= attempt.started + attempt.seconds + _SKEW_SECONDS
