"""One start of a training inside an allocation: nodes are chosen and checked, the ranks run, their end is judged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.allocation import Allocation, Choice, choose_nodes, is_dead, say
from slurm.attempts import Attempt, now_text, record_surroundings, save_attempt, seconds_since
from slurm.bad_nodes import add_bad_node, read_bad_nodes
from slurm.job import Job
from slurm.launch import Launch, srun_command, step_environment, write_task_environment
from slurm.preflight import check_nodes
from slurm.profile import ClusterProfile
from slurm.run_files import Marks, checkpoint_steps, has_progressed, last_step, latest_checkpoint
from slurm.step import Step, StopRequest
from slurm.verdict import Verdict, judge


@dataclass(frozen=True)
class Start:
    """One start.

    Args:
        number: inside this allocation, from 1.
        folder: of the start.
        allocation: that it runs in.
        end_time: Unix time of the allocation's end, if known.
        stop: what tells the job to leave.
    """

    job: Job
    profile: ClusterProfile
    allocation: Allocation
    number: int
    folder: Path
    end_time: float | None
    stop: StopRequest

    def run(self) -> tuple[Attempt, Verdict]:
        """Choose nodes, run the ranks on them, judge how it ended.

        Raises:
            OSError: the folder cannot be written to.
        """
        attempt = self._described()
        record_surroundings(self.folder, self.profile.pass_environment)
        choice = self._choose()
        if choice is None:
            return attempt, Verdict("node failed", f"too few good nodes: {self._left_out()}")
        attempt.nodes, attempt.spares, attempt.left_out = choice.nodes, choice.spares, choice.left_out
        save_attempt(self.folder, attempt)
        # srun fails at once where the controller is away, which would look like a fault of the training.
        self.allocation.job_state()
        if self.stop.reason is not None:
            return attempt, Verdict("stopped", f"{self.stop.reason}, before the ranks were started")
        verdict = self._run_ranks(attempt)
        self._note_culprits(verdict)
        return attempt, verdict

    def may_follow(self) -> bool:
        """Whether this allocation still has enough good nodes for another start, as far as is known."""
        states = self.allocation.node_states(patience=30.0)
        return choose_nodes(self.allocation.nodes, states, self._avoided(), self.job.nodes) is not None

    def _described(self) -> Attempt:
        run_dir, checkpoint = self.job.run_dir, latest_checkpoint(self.job.run_dir)
        return Attempt(
            attempt=self.folder.name,
            submission=self.job.folder.name,
            job=self.allocation.job_id,
            began=now_text(),
            nodes=[],
            step_before=checkpoint.step if checkpoint else None,
            checkpoint_before=checkpoint.folder if checkpoint else None,
            checkpoints_before=checkpoint_steps(run_dir),
        )

    def _choose(self) -> Choice | None:
        """Nodes that neither SLURM, nor this run's list, nor preflight speaks against."""
        states = self.allocation.node_states(patience=30.0)
        choice = choose_nodes(self.allocation.nodes, states, self._avoided(), self.job.nodes)
        if choice is None or not self.profile.preflight.enabled:
            return choice
        # Spares too: they must be good when they are needed.
        for bad in check_nodes(self.job, self.profile, [*choice.nodes, *choice.spares], self.folder):
            self._avoid(bad.name, bad.reason, bad.check)
        return choose_nodes(self.allocation.nodes, states, self._avoided(), self.job.nodes)

    def _run_ranks(self, attempt: Attempt) -> Verdict:
        launch = Launch(
            name=attempt.attempt,
            attempt=self.folder,
            nodes=attempt.nodes,
            job_id=self.allocation.job_id,
            start=self.number,
            cpus_per_node=self.allocation.cpus_per_node,
            end_time=self.end_time,
        )
        write_task_environment(self.job, self.profile, launch)
        command = srun_command(self.job, self.profile, launch)
        (self.folder / "srun.txt").write_text(" ".join(command) + "\n", encoding="utf-8")
        origin = attempt.checkpoint_before or "the beginning"
        say(f"start {attempt.attempt} on {', '.join(attempt.nodes)}, from {origin}")
        before, began = Marks.of_run(self.job.run_dir), time.time()
        step = Step(command, step_environment(), self.folder, self.job.run_dir, self.profile.heartbeat)
        end = step.run(self.stop, self.allocation, attempt.nodes)
        verdict = judge(self.folder, self.job.run_dir, self.job.kind, end, before, began)
        return self._seen_from_slurm(verdict, attempt)

    def _seen_from_slurm(self, verdict: Verdict, attempt: Attempt) -> Verdict:
        """What SLURM knows of an end that the ranks' own traces do not explain."""
        if verdict.name not in ("crashed", "hung", "stopped"):
            return verdict
        states = self.allocation.node_states(patience=5.0)
        dead = tuple(node for node in attempt.nodes if is_dead(states.get(node, "")))
        if dead and verdict.name != "stopped":
            return Verdict("node failed", f"SLURM gave up {', '.join(dead)}; {verdict.reason}", dead)
        if self.stop.is_killed and self.allocation.is_over():
            return Verdict("cancelled", f"SLURM ended the job (cancelled, preempted or out of time); {verdict.reason}")
        return verdict

    def _note_culprits(self, verdict: Verdict) -> None:
        for node in verdict.culprits:
            self._avoid(node, verdict.reason, {"hung": "hang", "crashed": "crash"}.get(verdict.name, "node"))

    def _avoid(self, node: str, reason: str, check: str) -> None:
        hours = self.profile.restarts.exclude_hours
        say(f"{node} is left out for {hours:g} hours: {check}: {reason}")
        add_bad_node(self.job.slurm_dir, node, reason=reason, check=check, hours=hours, job=self.allocation.job_id)

    def _avoided(self) -> Mapping[str, str]:
        found = read_bad_nodes(self.job.slurm_dir).items()
        return {node: f"{entry.check}: {entry.reason}" for node, entry in found}

    def _left_out(self) -> str:
        states = self.allocation.node_states()
        known = {node: f"SLURM has it as {state}" for node, state in states.items() if is_dead(state)}
        known |= {node: why for node, why in self._avoided().items() if node in self.allocation.nodes}
        return "; ".join(f"{node}: {why}" for node, why in known.items())


def close_attempt(job: Job, attempt: Attempt, verdict: Verdict) -> None:
    """Complete the record of a start with what it left; the caller says what follows, and writes the line."""
    checkpoint = latest_checkpoint(job.run_dir)
    attempt.ended, attempt.seconds = now_text(), seconds_since(attempt.began)
    attempt.step_after = last_step(job.run_dir)
    attempt.checkpoint_after = checkpoint.folder if checkpoint else None
    attempt.progress = has_progressed(attempt.checkpoints_before, checkpoint_steps(job.run_dir))
    attempt.verdict, attempt.reason = verdict.name, verdict.reason
    attempt.culprits = list(verdict.culprits)
