"""`megatron-video slurm status [RUN|NAME|JOB ...]`: how jobs stand, in the queue and in their runs' folders.

Exit code 0: all of them wait, run, or are done; 1: one of them is over without being done; 3: SLURM does not answer,
and a run's folder alone does not tell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_video.errors import UserError
from slurm.chain_commands import show_chain
from slurm.chain_record import find_chain
from slurm.checks import show_time
from slurm.job import load_job
from slurm.known_jobs import find_folder, known_jobs
from slurm.run_state import GOOD, Queue, RunState, job_numbers, run_state

_COLUMNS = ("JOB", "NAME", "STATE", "NODES", "LEFT", "STARTS", "STEP", "S/STEP", "LOSS", "SAVED", "GOODPUT")
_RECENT = 20
UNKNOWN_EXIT_CODE = 3


def main(argv: Sequence[str]) -> int:
    """Show the jobs once, or with --watch until Ctrl-C."""
    arguments = _parse(argv)
    if len(arguments.what) == 1 and (chain := find_chain(arguments.what[0])) is not None:
        return show_chain(chain, arguments.json)
    if not arguments.watch:
        states = _states(arguments)
        print(json.dumps([state.as_plain() for state in states], indent=1) if arguments.json else describe(states))
        return _exit_code(states)
    while True:
        text = describe(_states(arguments))
        # From the upper left corner, and nothing left below.
        sys.stdout.write(f"\x1b[H\x1b[J{text}\n" if sys.stdout.isatty() else f"{text}\n\n")
        sys.stdout.flush()
        time.sleep(arguments.every)


def describe(states: Sequence[RunState]) -> str:
    """A table of jobs, with lines below those of which there is more to say."""
    if not states:
        return "no jobs: none was submitted with megatron-video slurm from this account; name a RUN folder, or a job"
    rows = [_row(state) for state in states]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [_line(_COLUMNS, widths)]
    for state, row in zip(states, rows, strict=True):
        lines += [_line(row, widths), *(f"    {line}" for line in _details(state))]
    return "\n".join(lines)


def _states(arguments: argparse.Namespace) -> list[RunState]:
    named = list(dict.fromkeys(find_folder(what) for what in arguments.what))
    folders = named or _recent_folders()
    queue = Queue.read(job_numbers(folders), arguments.patience)
    return [run_state(folder, queue) for folder in folders]


def _recent_folders() -> list[Path]:
    """Newest jobs of the runs that were submitted last, oldest first."""
    newest: dict[Path, Path] = {}
    for known in known_jobs():
        folder = Path(known.folder)
        try:
            newest.setdefault(load_job(folder)[0].run_dir, folder)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
        if len(newest) == _RECENT:
            break
    return list(reversed(newest.values()))


def _exit_code(states: Sequence[RunState]) -> int:
    if any(state.state != "unknown" and state.state not in GOOD for state in states):
        return 1
    return UNKNOWN_EXIT_CODE if any(state.state == "unknown" for state in states) else 0


def _row(state: RunState) -> tuple[str, ...]:
    done = state.progress
    total = f"/{done['total_steps']}" if done.get("total_steps") else ""
    wanted = str(state.nodes_wanted)
    return (
        state.job or state.jobs[-1],
        state.name,
        state.state,
        f"{wanted} {state.nodes}" if state.nodes else wanted,
        show_time(state.seconds_left) if state.seconds_left is not None else "-",
        str(state.starts) if state.starts else "-",
        f"{done['step']}{total}" if done.get("step") is not None else f"-{total}",
        _number(done.get("step_seconds"), "{:.3g}"),
        _number(done.get("loss"), "{:.4g}"),
        _number(done.get("checkpoint_step"), "{}"),
        _number(done.get("goodput"), "~{:.0%}"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _details(state: RunState) -> list[str]:
    done, lines = state.progress, [f"run {state.run}"]
    if done.get("stage"):
        lines.append(f"stage {done['stage']}")
    if state.reason:
        lines.append(f"{'waits' if state.state == 'pending' else 'why'}: {state.reason}")
    if state.tasks:
        lines.append("tasks: " + ", ".join(f"{count} {name}" for name, count in state.tasks.items()))
    if state.starts and state.verdict:
        lines.append(f"last start that ended: {state.verdict}")
    if state.state == "running" and done.get("silent_seconds", 0) > 600:
        lines.append(f"no step for {show_time(int(done['silent_seconds']))}")
    if state.chained:
        lines.append(f"next in the chain: {', '.join(state.chained)}")
    lines += [f"avoids {node}: {why.splitlines()[0] if why else ''}" for node, why in state.bad_nodes.items()]
    return lines + _advice(state)


def _advice(state: RunState) -> list[str]:
    if state.state in ("stopped", "ended", "failed", "cancelled", "timeout", "node_fail", "out_of_memory"):
        return [f"go on: megatron-video slurm resume {state.run}"]
    if state.state == "no restart":
        return [f"see megatron-video slurm logs {state.run} --errors; then: slurm resume {state.run} --force"]
    return []


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video slurm status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="RUN|NAME|JOB", help="run's folder, job's name or number (default: the last ones)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between readings (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for a SLURM that is away (default: %(default)s)"
    )
    return parser.parse_args(argv)
