"""How a start of a training ended, told from what it left: exit codes do not survive srun and torchrun.

finished      all ranks left with 0, or status.json says so        DONE
bad input     a rank left with 2                                    NO_RESTART
diverged      a rank left with 3                                    NO_RESTART
stopped       143: it was told to, and has saved                    requeue, or the next job of the chain
hung          75, or no sign of life                                restart without the culprit
node failed   SLURM gave a node up, or could not start a task       restart on other nodes
crashed       anything else                                         restart
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slurm.rank import FAILURES_FOLDER, NODES_FOLDER, stacks_file
from slurm.run_files import STATUS_FILE, Marks, new_events, read_status
from slurm.step import StepEnd

Name = Literal[
    "finished",
    "bad input",
    "diverged",
    "stopped",
    "out of time",
    "hung",
    "node failed",
    "crashed",
    "cancelled",
    "lost",
]
EXIT_CODES: dict[str, int] = {"finished": 0, "bad input": 2, "diverged": 3, "hung": 75, "stopped": 143}
"""Of the batch job, where it ends for good; 1 for the others."""
FINAL: tuple[Name, ...] = ("bad input", "diverged")
"""Another start would end alike."""

_BAD_INPUT, _DIVERGED, _HUNG, _SAVED = 2, 3, 75, (143, 130)
# Trainings whose status.json tells the state of the whole job and not of a stage.
_ONE_RUN = ("pretrain", "vae")
# By srun: a node that a task could not be started on, and the first task that failed.
_NOT_LAUNCHED = re.compile(r"Task launch for StepId=\S+ failed on node (\S+?): (.+)")
_TASK_FAILED = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (.+)")
_SIGNALLED = re.compile(r"Killed|Bus error|Segmentation fault|Illegal instruction|Out Of Memory")
_LOST_NODE = re.compile(r"Node failure on (\S+)")
# By torchrun, of a rank that a signal ended: killed (out of memory), bus error, segmentation fault, ....
_KILLED_RANK = re.compile(r"exitcode\s*: (-(?:9|7|11|4))\b")
_ERROR_LINE = re.compile(r"^(?:\[\S+\]:|\d+: )?(error: .+)$", re.MULTILINE)
# What only a machine says.
_HARDWARE = re.compile(
    r"uncorrectable (?:NVLink|ECC)|double bit ECC|CUDA error: (?:unspecified launch failure|hardware|uncorrectable|"
    r"an illegal instruction)|device-side hardware|GPU is lost|fallen off the bus|No CUDA GPUs are available|"
    r"CUDA driver initialization failed|Xid|Stale file handle|Input/output error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong."""

    node: str | None
    text: str
    code: int | None = None
    """Exit code of a rank."""


@dataclass(frozen=True)
class Verdict:
    """How a start ended."""

    name: Name
    reason: str
    culprits: tuple[str, ...] = ()
    """Nodes that are to blame and are left out from now on."""
    suspect: str | None = None
    """Node of the first failure: nothing yet, but to blame if it comes first again."""


def judge(attempt: Path, run_dir: Path, kind: str, end: StepEnd, before: Marks, began: float) -> Verdict:
    """Tell how a start ended.

    Args:
        attempt: its folder.
        run_dir: the run's.
        kind: of the job.
        end: of its step.
        before: the run's files as they were before it.
        began: Unix time of its start.
    """
    fresh = Marks.of_run(run_dir).changed_since(before, STATUS_FILE)
    state = read_status(run_dir).get("state") if fresh else None
    # Of a job with --no-kill srun leaves with 0 when the only node of its step is lost.
    lost = _LOST_NODE.search(_read(attempt / "srun.log"))
    if (end.code == 0 and not lost) or (kind in _ONE_RUN and state == "finished"):
        return Verdict("finished", "all ranks have come to their end")
    failure = first_failure(attempt)
    if end.dead_nodes:
        return Verdict("node failed", f"SLURM gave up {', '.join(end.dead_nodes)}", end.dead_nodes)
    if end.silent:
        return Verdict("hung", end.silent, _without_stacks(attempt))
    hangs = new_events(run_dir, "hang", began)
    if state == "hung" or failure.code == _HUNG or hangs:
        return _hang(attempt, hangs)
    codes = {record["code"] for record in _records(attempt)}
    if state == "stopped" or (codes and codes <= set(_SAVED)):
        return Verdict("stopped", _why_stopped(run_dir, end, began))
    if failure.code == _BAD_INPUT:
        return Verdict("bad input", _at(failure))
    if failure.code == _DIVERGED:
        return Verdict("diverged", _why_stopped(run_dir, end, began, failure))
    return _crash(attempt, failure)


def first_failure(attempt: Path) -> Failure:
    """The first thing that went wrong in a start, and where."""
    said = _read(attempt / "srun.log")
    for pattern in (_NOT_LAUNCHED, _LOST_NODE):
        if match := pattern.search(said):
            return Failure(match[1].rstrip(":,"), match[0])
    # A rank that a signal ended leaves no record, and the others then fail because of it.
    if (match := _TASK_FAILED.search(said)) and _SIGNALLED.match(match[2]):
        return Failure(match[1], match[0])
    for log in _node_logs(attempt):
        if match := _KILLED_RANK.search(_tail(log)):
            return Failure(log.stem, f"a rank was ended by signal {match[1][1:]}", int(match[1]))
    records = sorted(_records(attempt), key=lambda record: float(record["time"]))
    if records:
        first = records[0]
        text = first["error"] or _last_error_line(attempt, first["node"]) or f"exit code {first['code']}"
        return Failure(first["node"], f"rank {first['rank']}: {text}", int(first["code"]))
    if match := _TASK_FAILED.search(said):
        return Failure(match[1], f"{match[0]}: {_last_line(attempt / NODES_FOLDER / f'{match[1]}.log')}")
    lines = said.strip().splitlines()
    return Failure(None, lines[-1] if lines else "srun said nothing")


def _crash(attempt: Path, failure: Failure) -> Verdict:
    said = _read(attempt / "srun.log")
    lost = failure.node and (_NOT_LAUNCHED.search(said) or _LOST_NODE.search(said))
    if failure.node and lost:
        return Verdict("node failed", failure.text, (failure.node,))
    if failure.node and _HARDWARE.search(failure.text):
        return Verdict("crashed", _at(failure), (failure.node,))
    return Verdict("crashed", _at(failure), suspect=failure.node)


def _hang(attempt: Path, hangs: Sequence[dict[str, Any]]) -> Verdict:
    """As the training's own watchdog told it."""
    named = hangs[-1]["culprits"] if hangs else []
    nodes = _nodes_by_host(attempt)
    culprits = tuple(dict.fromkeys(nodes.get(culprit["host"], culprit["host"]) for culprit in named))
    why = "; ".join(f"rank {culprit['rank']} on {culprit['host']} {culprit['why']}" for culprit in named)
    return Verdict("hung", why or "all ranks waited alike, none is to blame", culprits)


def _without_stacks(attempt: Path) -> tuple[str, ...]:
    """Nodes of ranks that did not even write their stacks when they were asked to, unless that is all of them."""
    nodes = [json.loads(_read(path)) for path in sorted((attempt / NODES_FOLDER).glob("*.json"))]
    silent = [node["node"] for node in nodes if not all(_read(stacks_file(attempt, rank)) for rank in _ranks(node))]
    return tuple(silent) if len(silent) < len(nodes) else ()


def _ranks(node: dict[str, Any]) -> range:
    first, last = node["ranks"]
    return range(first, last + 1)


def _why_stopped(run_dir: Path, end: StepEnd, began: float, failure: Failure | None = None) -> str:
    stops = new_events(run_dir, "stop", began)
    own = str(stops[-1]["reason"]) if stops else ""
    if failure is not None:
        return own or _at(failure)
    return f"{end.warned}: saved and left" if end.warned else f"saved and left ({own or 'reason unknown'})"


def _nodes_by_host(attempt: Path) -> dict[str, str]:
    """SLURM's name of each node, by the one that the training knows."""
    found = [json.loads(_read(path)) for path in (attempt / NODES_FOLDER).glob("*.json")]
    return {record["host"]: record["node"] for record in found}


def _records(attempt: Path) -> list[dict[str, Any]]:
    return [json.loads(_read(path)) for path in (attempt / FAILURES_FOLDER).glob("rank_*.json")]


def _at(failure: Failure) -> str:
    return f"{failure.text} (on {failure.node})" if failure.node else failure.text


def _node_logs(attempt: Path) -> list[Path]:
    return sorted((attempt / NODES_FOLDER).glob("*.log"))


def _last_error_line(attempt: Path, node: str) -> str | None:
    """What a command told its user: `error: ...`."""
    found = _ERROR_LINE.findall(_tail(attempt / NODES_FOLDER / f"{node}.log"))
    return str(found[-1]) if found else None


def _last_line(log: Path) -> str:
    lines = _tail(log).strip().splitlines()
    return lines[-1] if lines else "no output"


def _tail(path: Path) -> str:
    return _read(path)[-200_000:]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
