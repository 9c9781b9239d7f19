"""What one rank knows of itself when the job makes no progress, and who of all is to blame.

In synchronous training one stuck rank stops all others within a step, each in the first collective that needs it. Which
one is stuck is told by comparison: it is silent, or in an earlier part of the step, or has called fewer collectives
than those that wait for it, or is the one that waits for nobody.
"""

from __future__ import annotations

import json
import linecache
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from megatron.core import parallel_state

from training.checkpoint_saver import SAVE_GROUP
from training.phases import PHASES, Heartbeat
from training.rank_table import RankPlace, RankTable
from training.telemetry import write_json

_PROJECT = Path(__file__).parents[1]
# Name of the thread that builds batches where there are no worker processes (training/data.py).
LOADER_THREAD = "batches"
# Calls in which a thread waits for other ranks (or for the device, whose queue holds the collectives).
_WAITING_CALLS = (".wait(", "barrier(", "synchronize(", ".tolist()", ".item()", "_recv", ".recv(")


@dataclass(frozen=True)
class RankReport:
    """One rank's account of itself; the fields are those of its file."""

    rank: int
    step: int
    phase: str
    seconds: float
    """Since its last sign of progress."""
    place: str
    """The innermost line of this project that its main thread is in."""
    waits_in: str | None
    """The collective or wait that its main thread is in, or None."""
    collectives: dict[str, int]
    """Collectives called so far, by process group."""
    loader: list[str]
    """Where the threads and processes that build its batches are."""
    neighbours: dict[int, str]
    """State of the processes of all ranks on its host, as the system sees it."""


@dataclass(frozen=True)
class Culprit:
    """A rank that the others wait for, and how it was recognised."""

    rank: int
    why: str


def describe_this_rank(table: RankTable, heartbeat: Heartbeat, now: float) -> RankReport:
    """The report of this rank, called from another thread than the stuck one; takes no lock and calls no collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return RankReport(
        rank=table.rank,
        step=heartbeat.step,
        phase=heartbeat.phase,
        seconds=now - heartbeat.since,
        place=_project_line(frame),
        waits_in=_waiting_call(frame),
        collectives=_collectives(),
        loader=_loader_places() if heartbeat.phase == "data" else [],
        neighbours={place.rank: process_state(place.pid) for place in table.neighbours},
    )


def find_culprits(reports: Mapping[int, RankReport], table: RankTable) -> list[Culprit]:
    """The ranks that the others wait for; empty when all wait alike, as they do when the network is stuck."""
    silent = [place for place in table.places if place.rank not in reports]
    if silent:
        return [Culprit(place.rank, f"gave no sign of life; {_seen_from_outside(place, reports)}") for place in silent]
    # Each test narrows down those that the one before could not tell apart.
    last = min(_position(report) for report in reports.values())
    behind = [report for report in reports.values() if _position(report) == last]
    why = ""
    if len(behind) < len(reports):
        why = f"is behind the others, in {behind[0].phase} of step {behind[0].step + 1}"
    laggards = [report for report in behind if _called_fewer(report, reports)]
    if laggards:
        behind, why = laggards, why or "has called fewer collectives than those that wait for it"
    busy = [report for report in behind if report.waits_in is None]
    if busy and len(busy) < len(behind):
        behind, why = busy, why or "is in no collective while the others wait in one"
    return [Culprit(report.rank, f"{why}; {_where(report)}") for report in behind] if why else []


def write_report(report: RankReport, folder: Path) -> None:
    """Leave the report where all ranks look for it; it appears whole."""
    write_json(folder / f"rank_{report.rank:05d}.json", asdict(report))


def find_reports(folder: Path) -> list[Path]:
    """Files of the reports that are there by now, in rank order."""
    return sorted(folder.glob("rank_*.json"))


def read_reports(folder: Path) -> dict[int, RankReport]:
    """The reports that are there by now, by rank."""
    reports = {}
    for path in find_reports(folder):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["neighbours"] = {int(rank): state for rank, state in values["neighbours"].items()}
        reports[values["rank"]] = RankReport(**values)
    return reports


def process_state(pid: int) -> str:
    """State of a process of this host, such as `running`, `stopped` (by a signal) or `gone`."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"


def dump_flight_recorder(path: Path) -> None:
    """torch's record of the last collectives, where it keeps one (TORCH_FR_BUFFER_SIZE and NCCL)."""
    functions = vars(torch._C._distributed_c10d)
    dump: Callable[[], Any] | None = functions.get("_dump_fr_trace") or functions.get("_dump_nccl_trace")
    if dump is not None and torch.distributed.get_backend() == "nccl":
        path.write_bytes(dump())


def _position(report: RankReport) -> tuple[int, int]:
    return report.step, PHASES.index(report.phase)


def _called_fewer(report: RankReport, reports: Mapping[int, RankReport]) -> bool:
    """Whether some group waits for this rank, and this rank for none: those it waits for have called fewer still."""
    others = [
        (ours, other.collectives[name])
        for other in reports.values()
        for name, ours in report.collectives.items()
        if name in other.collectives
    ]
    return any(ours < theirs for ours, theirs in others) and not any(ours > theirs for ours, theirs in others)


def _where(report: RankReport) -> str:
    parts = [f"for {report.seconds:.1f} s at {report.place}"]
    parts += [f"waits in {report.waits_in}"] if report.waits_in else []
    parts += [f"loader: {'; '.join(report.loader)}"] if report.loader else []
    return ", ".join(parts)


def _seen_from_outside(place: RankPlace, reports: Mapping[int, RankReport]) -> str:
    states = {report.neighbours[place.rank] for report in reports.values() if place.rank in report.neighbours}
    if states:
        return f"its process {place.pid} is {' / '.join(sorted(states))}"
    return f"no other rank runs on its host {place.host}, which may be lost"


def _collectives() -> dict[str, int]:
    """How many collectives this rank has called in each group.

    Pipeline groups are left out: their stages send and receive different numbers of messages. So are those of saves,
    which are used by threads of their own.
    """
    world = torch.distributed.distributed_c10d._world
    skipped = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    return {
        name: group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # missing in torch's stubs
        for group, name in dict(world.pg_names).items()
        if group is not skipped and group.size() > 1 and group.group_desc != SAVE_GROUP
    }


def _frames(frame: FrameType | None) -> list[FrameType]:
    """A thread's frames, innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(_PROJECT) if path.is_relative_to(_PROJECT) else path
    return f"{shown}:{frame.f_lineno} ({frame.f_code.co_name})"


def _project_line(frame: FrameType | None) -> str:
    frames = _frames(frame)
    # An environment inside the checkout holds other people's code.
    ours = [item for item in frames if _is_ours(Path(item.f_code.co_filename))]
    return _line((ours or frames)[0]) if frames else "no Python code"


def _is_ours(path: Path) -> bool:
    # phases.py stands between caller and called everywhere and says nothing.
    return path.is_relative_to(_PROJECT) and "site-packages" not in path.parts and path.name != "phases.py"


def _waiting_call(frame: FrameType | None) -> str | None:
    frames = _frames(frame)
    if not frames:
        return None
    inside = [item for item in frames if "/torch/distributed/" in item.f_code.co_filename]
    if inside and inside[0] is frames[0]:
        # The outermost of them is the one that was called: all_reduce and not its wrapper.
        named = [item.f_code.co_name for item in inside if item.f_code.co_name != "wrapper"]
        return named[0] if named else "torch.distributed"
    text = linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno).strip()
    return text if any(call in text for call in _WAITING_CALLS) else None


def _loader_places() -> list[str]:
    """The thread of the loader, and the state of its worker processes."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread.name == LOADER_THREAD]
    places = [f"thread at {_project_line(frames.get(thread.ident or 0))}" for thread in threads]
    workers = psutil.Process().children()
    return places + [f"worker {worker.pid} is {process_state(worker.pid)}" for worker in workers]
