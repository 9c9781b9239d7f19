"""`events.jsonl` of a run: one line for everything that happened beside the steps, from every life of the job.

A line holds `time` (UTC), `life` (the start of the job it belongs to, as in run_info.json), `rank` (who wrote it),
`event` (a name of EVENTS), `step` (optimizer steps done) and that event's own fields. Lines are added by one write of a
few hundred bytes each, so several ranks may add to the file, and a reader meets at most one torn line: the last of a
life that was killed.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class EventKind:
    """What an event means, and the fields its line always has; it may have more."""

    meaning: str
    fields: tuple[str, ...] = ()
    fault: bool = False
    """Whether it tells of something that went wrong."""


EVENTS: dict[str, EventKind] = {
    "start": EventKind("a new run began", ("world_size",)),
    "resume": EventKind("a life went on from a checkpoint", ("checkpoint", "world_size")),
    "stop": EventKind("a life ended and could say why", ("state", "reason")),
    "save": EventKind(
        "a checkpoint is complete; blocked_seconds: what training waited for it",
        ("checkpoint", "seconds", "blocked_seconds", "bytes"),
    ),
    "save_failed": EventKind("a checkpoint could not be written", ("checkpoint", "reason"), fault=True),
    "checkpoint_refused": EventKind(
        "a damaged or half-written checkpoint was passed over", ("checkpoint", "reason"), fault=True
    ),
    "refused_step": EventKind(
        "loss or gradient was not finite, weights unchanged; batches: those whose loss was not finite, else all",
        ("loss", "grad_norm", "in_a_row", "batches"),
        fault=True,
    ),
    "spike": EventKind(
        "loss or gradient norm far above its usual range", ("measure", "value", "limit", "in_a_row"), fault=True
    ),
    "rollback": EventKind(
        "weights went back to a checkpoint; skipped: data steps [first, end) that are left out from now on",
        ("checkpoint", "from_step", "skipped", "rollbacks"),
        fault=True,
    ),
    "rollback_impossible": EventKind(
        "a spike that no checkpoint lies before; training went on", ("reason",), fault=True
    ),
    "hang": EventKind(
        "a rank made no progress and the job ended; culprits: rank, host, phase, seconds, why; stacks: folder of them",
        ("culprits", "waiting", "stacks"),
        fault=True,
    ),
    "straggler": EventKind(
        "a rank was slower than the others of its pipeline stage",
        ("slow_rank", "host", "coordinates", "phase", "seconds", "others_seconds", "ratio", "z_score"),
        fault=True,
    ),
    "corrupt_sample": EventKind("a sample could not be read and was left out", ("key", "reason"), fault=True),
    "validation": EventKind(
        "losses on held-out samples, by the name of the weights: loss, by_time (at quantiles of t), by_bucket; drift: "
        "the same of the distance between policy and reference, in runs on preference pairs",
        ("seconds", "quantiles", "losses"),
    ),
    "samples": EventKind("sample videos were made", ("seconds", "folder", "weights")),
}
# Names of the events that tell of something that went wrong.
FAULTS = tuple(name for name, kind in EVENTS.items() if kind.fault)


class EventLog:
    """Adds events of this rank to the run's file.

    Args:
        run_dir: the run's folder; made with the first event.
        rank: this rank.
        world_size: ranks of the job.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        self.path, self.rank, self.world_size = run_dir / EVENTS_FILE, rank, world_size

    def record(self, event: str, step: int, **details: Any) -> None:
        """Add one event; call it on the one rank that speaks for all, or on the rank that it happened to.

        Raises:
            ValueError: an event that EVENTS does not list, or one without its fields.
        """
        missing = sorted({*EVENTS[event].fields} - {*details}) if event in EVENTS else ["a place in EVENTS"]
        if missing:
            raise ValueError(f"event {event!r} lacks {missing}")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "life": newest_life(self.path.parent),
            "rank": self.rank,
            "event": event,
            "step": step,
            **details,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: lines of several ranks do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(_plain(line)) + "\n").encode())
        finally:
            os.close(handle)


def read_events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    """Events of a run in the order they were written, of all kinds or those named; a torn line is left out."""
    path = run_dir / EVENTS_FILE
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:  # the writer was killed, or the disk was full
            continue
        if not kinds or event["event"] in kinds:
            found.append(event)
    return found


def newest_life(run_dir: Path) -> int | None:
    """Number of the newest start of the job, or None before the first one is recorded."""
    try:
        lives: list[Any] = json.loads((run_dir / "run_info.json").read_text(encoding="utf-8"))["lives"]
    except OSError:
        return None
    return len(lives)


def _plain(value: Any) -> Any:
    """Values that every JSON reader takes: numbers that are not finite become their names."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
