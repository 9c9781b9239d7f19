"""How a chain stands: every stage by the results that its units left, and by the queue for what is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from slurm import scheduler
from slurm.chain import ChainStage
from slurm.chain_record import ChainRecord
from slurm.job import DONE, SLURM_FOLDER
from slurm.live_jobs import base_number
from slurm.results import read_results
from slurm.scheduler import QueuedJob

State = Literal["done", "running", "waiting", "failed", "stopped", "cancelled", "not submitted", "unknown"]
HELD = "JobHeldUser"
_MESSAGES_SHOWN = 5


@dataclass(frozen=True)
class StageState:
    """One stage."""

    name: str
    state: State
    units: int
    done: int = 0
    running: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """Begun by a job that is over and left no word: its node went down, or it was killed."""
    jobs: list[str] = field(default_factory=list)
    """SLURM's numbers, oldest first."""
    why: str = ""
    """Why it waits, or was cancelled."""
    messages: dict[int, str] = field(default_factory=dict)
    """Last word of every unit that failed."""
    logs: dict[int, str] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    """Units that are not done."""
    seconds: float = 0.0
    """Of the finished units together."""

    @property
    def live(self) -> bool:
        """Whether a job of it is in the queue."""
        return self.state in ("running", "waiting")


def chain_states(record: ChainRecord, patience: float = 60.0) -> list[StageState]:
    """All stages of a chain; what is not done is `unknown` while the controller is away.

    Raises:
        SlurmError: the queue cannot be read.
    """
    numbers, away = record.numbers(), False
    try:
        live = scheduler.queued(f"--jobs={','.join(numbers)}", patience=patience) if numbers else []
    except scheduler.SlurmAwayError:
        live, away = [], True
    states: list[StageState] = []
    for stage in record.chain.stages:
        newest = record.newest(stage.name)
        mine = [job for job in live if newest is not None and base_number(job.job_id) == newest.number]
        states.append(_training(record, stage, mine) if stage.is_training else _stage(record, stage, mine, states))
    if not away:
        return states
    why = "SLURM does not answer"
    return [state if state.state == "done" else replace(state, state="unknown", why=why) for state in states]


def chain_verdict(states: Sequence[StageState]) -> str:
    """One word for the whole chain."""
    for state in ("unknown", "running", "waiting"):
        if any(stage.state == state for stage in states):
            return state
    if all(stage.state == "done" for stage in states):
        return "done"
    return "failed" if any(stage.state == "failed" for stage in states) else "stopped"


def _stage(
    record: ChainRecord, stage: ChainStage, live: Sequence[QueuedJob], before: Sequence[StageState]
) -> StageState:
    results = read_results(record.stage_dir(stage.name) / "results", stage.units)
    of = {name: [unit for unit, result in results.items() if result.state == name] for name in ("done", "failed")}
    stopped = [unit for unit, result in results.items() if result.state == "stopped"]
    begun = [unit for unit, result in results.items() if result.state == "running"]
    left = [unit for unit in range(stage.units) if unit not in of["done"]]
    state, why = _judge(record, stage, live, before, left=left, failed=of["failed"], begun=[*begun, *stopped])
    return StageState(
        name=stage.name,
        state=state,
        units=stage.units,
        done=len(of["done"]),
        running=begun if state == "running" else [],
        failed=of["failed"],
        lost=begun if state not in ("running", "waiting") else [],
        jobs=[job.number for job in record.jobs.get(stage.name, [])],
        why=why,
        messages={unit: results[unit].message for unit in (*of["failed"], *stopped)},
        logs={unit: results[unit].log for unit in (*of["failed"], *stopped, *begun)},
        left=left,
        seconds=sum(result.seconds for result in results.values()),
    )


def _judge(
    record: ChainRecord,
    stage: ChainStage,
    live: Sequence[QueuedJob],
    before: Sequence[StageState],
    left: Sequence[int],
    failed: Sequence[int],
    begun: Sequence[int],
) -> tuple[State, str]:
    if live:
        return _in_queue(live)
    if not left:
        return "done", ""
    if stage.name not in record.jobs:
        return "not submitted", ""
    if failed:
        return "failed", ""
    if begun:
        return "stopped", "cancelled, out of time, or lost with its node"
    unfinished = [state.name for state in before if state.name in record.chain.awaited(stage) and state.state != "done"]
    return "cancelled", f"{', '.join(unfinished)} did not succeed" if unfinished else ""


def _training(record: ChainRecord, stage: ChainStage, live: Sequence[QueuedJob]) -> StageState:
    verdict = record.cwd / str(stage.run_dir) / SLURM_FOLDER / DONE
    jobs = [job.number for job in record.jobs.get(stage.name, [])]
    state: State
    if live:
        state, why = _in_queue(live)
    elif verdict.exists():
        state, why = "done", ""
    else:
        begun = (verdict.parent / "attempts.jsonl").exists()
        state, why = ("stopped" if begun else "cancelled" if jobs else "not submitted"), ""
    done = int(state == "done")
    return StageState(stage.name, state, 1, done=done, jobs=jobs, why=why, left=[] if done else [0])


def _in_queue(live: Sequence[QueuedJob]) -> tuple[State, str]:
    if any(job.state != "PENDING" for job in live):
        return "running", ""
    return "waiting", live[0].reason


def states_as_json(record: ChainRecord, states: Sequence[StageState]) -> dict[str, Any]:
    """For a program."""
    return {
        "chain": record.chain.name,
        "folder": str(record.folder),
        "output": record.chain.output,
        "submitted": record.time,
        "state": chain_verdict(states),
        "stages": [asdict(state) for state in states],
    }


def describe_chain(record: ChainRecord, states: Sequence[StageState]) -> str:
    """For a person: a line a stage, what went wrong, and what can be done."""
    made = f" -> {record.chain.output}" if record.chain.output else ""
    lines = [f"chain {record.chain.name}{made}: {chain_verdict(states)}; submitted {record.time} by {record.user}"]
    width = max(len("stage"), *(len(state.name) for state in states)) + 2
    lines.append(f"  {'stage':<{width}}{'state':<15}{'done':>11}{'running':>9}{'failed':>8}  jobs")
    for state in states:
        share = f"{state.done}/{state.units}"
        running, jobs = len(state.running), ", ".join(state.jobs)
        why = f"  ({state.why})" if state.why else ""
        line = f"  {state.name:<{width}}{state.state:<15}{share:>11}{running:>9}{len(state.failed):>8}  {jobs}{why}"
        lines.append(line.rstrip())
    lines += [line for state in states for line in _troubles(state)]
    lines.append(_advice(record, states))
    return "\n".join(line for line in lines if line)


def _troubles(state: StageState) -> list[str]:
    lines = []
    for unit, message in list(state.messages.items())[:_MESSAGES_SHOWN]:
        which = f"{state.name} {unit}" if state.units > 1 else state.name
        lines.append(f"    {which}: {message}\n      {state.logs[unit]}")
    more = len(state.messages) - _MESSAGES_SHOWN
    return [*lines, *([f"    and {more} more"] if more > 0 else [])]


def _advice(record: ChainRecord, states: Sequence[StageState]) -> str:
    if chain_verdict(states) in ("failed", "stopped"):
        left = sum(len(state.left) for state in states if state.done and state.left)
        what = f"the {left} units that are left, and what follows" if left else "what is left"
        return f"go on: megatron-video slurm resume {record.chain.output or record.folder}  ({what})"
    return ""
