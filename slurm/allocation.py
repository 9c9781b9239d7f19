"""The allocation that a supervisor runs in: its nodes and their states, its end, and giving it back.

A controller that is away answers nothing; a job that is well goes on without its answers.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from slurm.scheduler import SlurmAwayError, SlurmError, ask, compress, expand, job_records
from slurm.scheduler import nodes as node_records
from slurm.submitted import read_submitted

# How long a controller may be away when the job is about to leave.
PATIENCE_SECONDS = 900.0
# How long steps that have ended may take to be told to the controller.
_STEPS_SECONDS = 120.0
# States in which nothing runs on a node. One that merely does not answer (`*`) may be restarting its daemon.
_DEAD = {"DOWN", "FAIL", "POWERED_DOWN", "POWERING_DOWN", "UNKNOWN"}
# States in which somebody wants the node out: its job may go on, but better elsewhere.
_DOUBTFUL = {"DRAIN", "DRAINING", "DRAINED", "FAILING", "MAINT", "REBOOT"}


@dataclass(frozen=True)
class Allocation:
    """What SLURM gave this job."""

    job_id: str
    restart: int
    """How often the job was requeued before."""
    nodes: list[str]
    cpus_per_node: int

    @staticmethod
    def of_this_job() -> Allocation:
        """From the environment of the batch process.

        Raises:
            SlurmError: this is not one.
        """
        try:
            job_id, listed = os.environ["SLURM_JOB_ID"], os.environ["SLURM_JOB_NODELIST"]
        except KeyError as error:
            raise SlurmError(f"{error} is not set: slurm.supervise is the batch process of a SLURM job") from None
        cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", os.cpu_count() or 1))
        return Allocation(job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")), expand(listed), cpus)

    def end_time(self) -> float | None:
        """Unix time at which SLURM ends the job; None: not known, or no limit."""
        if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            return float(os.environ["SLURM_JOB_END_TIME"])
        try:
            text = ask("squeue", "--noheader", f"--jobs={self.job_id}", "--format=%e", patience=PATIENCE_SECONDS)
            return datetime.fromisoformat(text.strip()).timestamp()
        except (SlurmError, ValueError):
            return None

    def node_states(self, patience: float = 0.0) -> dict[str, str]:
        """State of every node, as scontrol has it; empty while the controller is away."""
        return states_of(self.nodes, patience)

    def job_state(self, patience: float = PATIENCE_SECONDS) -> str:
        """The job's own state, such as RUNNING or COMPLETING; empty: the controller is away."""
        try:
            return job_records(self.job_id, patience=patience)[0]["JobState"]
        except (SlurmError, IndexError, KeyError):
            return ""

    def is_over(self) -> bool:
        """Whether SLURM is ending the job: it was cancelled, lost a node, or is preempted."""
        return self.job_state(patience=0.0) not in ("RUNNING", "")

    def requeue(self, exclude: Sequence[str]) -> str | None:
        """Put the job back into the queue, to start without some nodes.

        Returns:
            None: SLURM ends this process now; otherwise why it would not.
        """
        state = self.job_state()
        # Of a job that was cancelled this would make one that runs again.
        if state != "RUNNING":
            return f"SLURM has the job as {state or 'unknown'}"
        self._await_steps()
        # SLURM ends all processes of the job from then on, a scontrol that is still to tell it something too.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        refused = self._requeue()
        if refused is None:
            # A job can be told which nodes to avoid only while it waits; this one does, from here on.
            exclude_nodes([self.job_id], exclude)
        else:
            signal.signal(signal.SIGTERM, before)
        return refused

    def _requeue(self) -> str | None:
        try:
            ask("scontrol", "requeue", self.job_id, patience=PATIENCE_SECONDS)
        except SlurmAwayError as error:
            # The answer may be what was lost: only a job that still runs was not requeued.
            return str(error) if self.job_state() == "RUNNING" else None
        except SlurmError as error:
            return str(error)
        return None

    def steps(self) -> dict[str, str]:
        """Steps that SLURM knows of, the batch process aside: number -> name.

        Raises:
            SlurmError: the controller is away.
        """
        options = ("--steps", "--noheader", f"--jobs={self.job_id}", "--format=%i %j")
        found = [line.split(maxsplit=1) for line in ask("squeue", *options, patience=10).splitlines() if line.strip()]
        return {number: "".join(name).strip() for number, *name in found if number.split(".")[-1].isdigit()}

    def _await_steps(self) -> None:
        """Wait until the ends of all steps have reached the controller.

        One that was away hears of them late, and would take the nodes of a job that is requeued before out of service
        ("Kill task failed").
        """
        deadline = time.monotonic() + _STEPS_SECONDS
        while time.monotonic() < deadline:
            try:
                if not self.steps():
                    return
            except SlurmError:
                pass
            time.sleep(1.0)


def states_of(nodes: Sequence[str], patience: float = 0.0) -> dict[str, str]:
    """State of some nodes; empty while the controller is away."""
    try:
        return {node.name: node.state for node in node_records(compress(nodes), patience=patience)}
    except SlurmError:
        return {}


def exclude_nodes(jobs: Sequence[str], exclude: Sequence[str]) -> None:
    """Let waiting jobs start without some nodes; what cannot be done is told."""
    for job_id in jobs if exclude else []:
        try:
            ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={compress(exclude)}", patience=20)
        except SlurmError as error:
            say(f"job {job_id} could not be kept from {', '.join(exclude)}: {error}")


def waiting_successors(folder: Path, job_id: str) -> list[str]:
    """Jobs of the same chain that are still to come; while the controller is away, all that were submitted."""
    jobs = read_submitted(folder).jobs
    later = jobs[jobs.index(job_id) + 1 :] if job_id in jobs else []
    found = []
    for successor in later:
        try:
            states = [record.get("JobState", "") for record in job_records(successor, patience=20)]
        except SlurmAwayError:
            states = ["PENDING"]
        except SlurmError:
            states = []
        if "PENDING" in states:
            found.append(successor)
    return found


@dataclass(frozen=True)
class Choice:
    """Nodes for a start."""

    nodes: list[str]
    spares: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    """Node -> why."""


def choose_nodes(
    allocated: Sequence[str], states: Mapping[str, str], bad: Mapping[str, str], count: int
) -> Choice | None:
    """`count` nodes of an allocation: healthy ones first, in SLURM's order, those that somebody drains last.

    Args:
        allocated: all nodes of the job; the last ones are the spares as long as all are well.
        states: as `Allocation.node_states` gives them; a node without a state counts as healthy.
        bad: nodes not to use -> why.
        count: how many are needed.

    Returns:
        None when there are not so many.
    """
    left_out = {node: bad[node] for node in allocated if node in bad}
    left_out |= {node: f"SLURM has it as {states[node]}" for node in allocated if is_dead(states.get(node, ""))}
    usable = [node for node in allocated if node not in left_out]
    usable.sort(key=lambda node: bool(_DOUBTFUL & words(states.get(node, ""))))
    if len(usable) < count:
        return None
    chosen = sorted(usable[:count], key=list(allocated).index)
    return Choice(chosen, usable[count:], left_out)


def is_dead(state: str) -> bool:
    """Whether SLURM has given a node up."""
    return bool(_DEAD & words(state))


def words(state: str) -> set[str]:
    """The parts of a state such as IDLE*+DRAIN."""
    return {part.rstrip("*~#!%$@^-") for part in state.split("+")} - {""}


def say(text: str) -> None:
    """A line in the job's log."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
