"""`megatron-video slurm logs RUN|NAME|JOB`: what a start of the job's ranks said, by node or by rank.

Without options: the log of the first node of the newest start. Before there is a start: what the batch script said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_video.errors import UserError
from slurm.attempts import ATTEMPT_FILE
from slurm.chain_commands import show_chain_logs
from slurm.chain_record import find_chain
from slurm.job import ATTEMPTS_FOLDER
from slurm.known_jobs import find_folder
from slurm.rank import FAILURES_FOLDER, NODES_FOLDER
from slurm.submitted import job_folders

_TRACEBACK = re.compile(r"^(?P<mark>(?:\[\S+?\]:|\d+: )?)Traceback \(most recent call last\):$")
_ERROR_LINE = re.compile(r"^(?:\[\S+?\]:|\d+: )?(?:error: |srun: error: |slurmstepd: error: )")
_POLL_SECONDS = 1.0


def main(argv: Sequence[str]) -> int:
    """Print the log that the options name."""
    arguments = _parse(argv)
    if (chain := find_chain(arguments.what)) is not None:
        return show_chain_logs(chain, arguments.stage, arguments.unit, arguments.lines)
    folder = find_folder(arguments.what)
    attempt = find_attempt(folder, arguments.attempt)
    if arguments.errors:
        return _show_error(folder, attempt)
    log = Log(_batch_log(folder)) if arguments.batch or attempt is None else _chosen(attempt, arguments)
    print(f"==> {log.path} <==", file=sys.stderr)
    _print_tail(log, arguments.lines)
    if arguments.follow:
        _follow(log)
    return 0


@dataclass(frozen=True)
class Log:
    """A file, or one rank's lines in it."""

    path: Path
    marks: tuple[str, ...] = ()
    """What the wanted lines begin with, one of them; none: all lines are wanted."""

    def has(self, line: str) -> bool:
        """Whether a line is wanted."""
        return not self.marks or line.startswith(self.marks)


def find_attempt(folder: Path, number: int | None) -> Path | None:
    """Folder of a start: the number-th of the run, counted from 1 over all its jobs; None: the newest of this job.

    Raises:
        UserError: there are fewer.
    """
    if number is None:
        here = _attempts(folder)
        return here[-1] if here else None
    all_of_run = [attempt for job in job_folders(folder.parents[1]) for attempt in _attempts(job)]
    if not 1 <= number <= len(all_of_run):
        raise UserError(f"--attempt {number}: the run has had {len(all_of_run)} starts; name one of them, from 1")
    return all_of_run[number - 1]


def first_error(attempt: Path) -> tuple[Path, list[str]] | None:
    """The log in which the first traceback of a rank over all nodes stands, and its lines; else the first lines of an
    error; else what the launcher says of its ranks.

    First by what the ranks noted at their ends; where none could, by the logs' last changes.
    """
    logs = _by_first_failure(attempt)
    for find in (_rank_traceback, _error_lines, _traceback):
        for log in logs:
            lines = find(_lines(log))
            if lines:
                return log, lines
    return None


def _by_first_failure(attempt: Path) -> list[Path]:
    logs = sorted((attempt / NODES_FOLDER).glob("*.log"), key=lambda path: path.stat().st_mtime)
    notes = (attempt / FAILURES_FOLDER).glob("rank_*.json")
    failures = [json.loads(path.read_text(encoding="utf-8")) for path in notes]
    order = [str(failure.get("node")) for failure in sorted(failures, key=lambda one: one.get("time", 0.0))]
    named = sorted((log for log in logs if log.stem in order), key=lambda log: order.index(log.stem))
    extra = [path for path in (attempt / "srun.log",) if path.exists()]
    return [*named, *(log for log in logs if log not in named), *extra]


def _rank_traceback(lines: Sequence[str]) -> list[str]:
    # torchrun's own, behind those of its ranks, says only that one failed.
    found = _traceback(lines)
    return [] if any("ChildFailedError" in line for line in found) else found


def _traceback(lines: Sequence[str]) -> list[str]:
    """The first traceback: up to the line that names the error, of the same rank."""
    for number, line in enumerate(lines):
        start = _TRACEBACK.match(line)
        if start is None:
            continue
        mark, found = start["mark"], [line]
        for later in lines[number + 1 :]:
            if not later.startswith(mark):
                # Ranks of a node write into each other.
                continue
            found.append(later)
            if not later[len(mark) :].startswith((" ", "\t")) and later[len(mark) :].strip():
                break
        return found
    return []


def _error_lines(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if _ERROR_LINE.match(line)][:10]


def _show_error(folder: Path, attempt: Path | None) -> int:
    found = first_error(attempt) if attempt is not None else None
    if found is None:
        print(f"no traceback and no error line in {attempt or folder}; the batch script's words: {_batch_log(folder)}")
        return 0
    path, lines = found
    print(f"==> {path} <==", file=sys.stderr)
    print("\n".join(lines))
    return 0


def _attempts(folder: Path) -> list[Path]:
    starts = (path.parent for path in (folder / ATTEMPTS_FOLDER).glob(f"*/{ATTEMPT_FILE}"))
    return sorted(starts, key=lambda path: [int(part) for part in path.name.split(".")])


def _chosen(attempt: Path, arguments: argparse.Namespace) -> Log:
    if arguments.rank is not None:
        return _log_of_rank(attempt, arguments.rank)
    logs = {path.stem: path for path in sorted((attempt / NODES_FOLDER).glob("*.log"))}
    nodes = json.loads((attempt / ATTEMPT_FILE).read_text(encoding="utf-8")).get("nodes") or list(logs)
    node = arguments.node or next((node for node in nodes if node in logs), None)
    if node is None:
        return Log(attempt / "srun.log")
    if node not in logs:
        raise UserError(f"--node {node}: no log of it in {attempt}; there are {', '.join(logs) or 'none'}")
    return Log(logs[node])


def _log_of_rank(attempt: Path, rank: int) -> Log:
    """Its lines in its node's log: torchrun marks them with the number on the node, srun with that of the task."""
    for path in sorted((attempt / NODES_FOLDER).glob("*.json")):
        first, last = json.loads(path.read_text(encoding="utf-8"))["ranks"]
        if first <= rank <= last:
            log = Log(path.with_suffix(".log"), (f"[default{rank - first}]:", f"{rank}: "))
            # With srun as the launcher nothing is marked, and the ranks of a node share its log.
            return log if any(map(log.has, _lines(log.path))) else Log(log.path)
    raise UserError(f"--rank {rank}: no node of {attempt} had it, or it had not started yet")


def _batch_log(folder: Path) -> Path:
    logs = sorted(folder.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise UserError(f"{folder}: the job has not started, so there are no logs; see megatron-video slurm status")
    return logs[-1]


def _print_tail(log: Log, count: int) -> None:
    if not log.path.exists():
        raise UserError(f"{log.path}: not there yet; see megatron-video slurm status")
    lines = [line for line in _lines(log.path) if log.has(line)]
    print("\n".join(lines if count == 0 else lines[-count:]), flush=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _follow(log: Log) -> None:
    """Print what is added, until Ctrl-C."""
    with open(log.path, encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        rest = ""
        try:
            while True:
                *lines, rest = (rest + file.read()).split("\n")
                sys.stdout.write("".join(f"{line}\n" for line in lines if log.has(line)))
                sys.stdout.flush()
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            return


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video slurm logs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="RUN|NAME|JOB", help="run's folder, job's name or number")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--node", help="log of this node")
    which.add_argument("--rank", type=int, help="log of this rank, or of its node where ranks share one")
    which.add_argument("--batch", action="store_true", help="what the batch script said: starts, verdicts, requeues")
    which.add_argument("--errors", action="store_true", help="the first traceback over all nodes")
    parser.add_argument("--attempt", type=int, metavar="K", help="the K-th start of the run (default: the newest)")
    parser.add_argument("--follow", action="store_true", help="go on printing what is added, until Ctrl-C")
    parser.add_argument("--lines", type=int, default=100, help="last lines; 0: all (default: %(default)s)")
    parser.add_argument("--stage", help="of a chain of stages: the logs of this one")
    parser.add_argument("--unit", type=int, help="of a chain's stage: this unit")
    return parser.parse_args(argv)
