"""`python -m slurm.supervise JOB_FOLDER`: the batch process of a training, on the first node of its allocation.

Starts the ranks, tells them to save before the time is over, judges how they ended, and starts them again: inside the
allocation as long as it has enough good nodes, else by a requeue or through the next job of a chain. Ends for good with
DONE or NO_RESTART in RUN/slurm.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from slurm.allocation import Allocation, exclude_nodes, is_dead, say, states_of, waiting_successors
from slurm.attempts import (
    Attempt,
    add_line,
    new_attempt_folder,
    read_attempts,
    unfinished_attempts,
    without_progress,
)
from slurm.bad_nodes import add_bad_node, read_bad_nodes
from slurm.job import DONE, NO_RESTART, STOP, Job, load_job
from slurm.profile import ClusterProfile
from slurm.scheduler import expand
from slurm.starts import Start, close_attempt
from slurm.step import StopRequest
from slurm.verdict import EXIT_CODES, FINAL, Verdict

# leave: give the allocation back, to go on in another one; end: not by itself.
Action = Literal["done", "no restart", "restart", "leave", "end"]
STOPPED_EXIT_CODE = EXIT_CODES["stopped"]
NO_RESTART_EXIT_CODE = 1


def main(argv: Sequence[str]) -> int:
    """Supervise the job of a folder to its end.

    Raises:
        UserError: no such folder, or this is no batch process.
    """
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python -m slurm.supervise JOB_FOLDER, as slurm/pretrain.sbatch calls it")
    job, profile = load_job(Path(argv[0]))
    code = left_already(job)
    if code is None:
        code = Supervisor.of_this_job(job, profile).run()
    say(f"the batch job ends with exit code {code}")
    return code


def left_already(job: Job) -> int | None:
    """Exit code of a job whose run needs nothing more, such as a later one of a chain; None: there is work."""
    for name, code in ((DONE, 0), (NO_RESTART, NO_RESTART_EXIT_CODE), (STOP, STOPPED_EXIT_CODE)):
        path = job.slurm_dir / name
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            say(f"nothing to do: there is {path}{f': {text}' if text else ''}")
            return code
    return None


@dataclass
class Supervisor:
    """One life of the batch process."""

    job: Job
    profile: ClusterProfile
    allocation: Allocation
    end_time: float | None
    stop: StopRequest
    suspect: str | None = None
    """Where the first failure of the last start was."""

    @staticmethod
    def of_this_job(job: Job, profile: ClusterProfile) -> Supervisor:
        """In the allocation around this process.

        Raises:
            SlurmError: there is none.
        """
        stop = StopRequest(job.slurm_dir, profile.restarts.warning_seconds)
        # First of all: a warning may come while the controller is asked.
        stop.listen()
        allocation = Allocation.of_this_job()
        end_time = allocation.end_time()
        stop.set_end(end_time)
        return Supervisor(job, profile, allocation, end_time, stop)

    def run(self) -> int:
        """Start the ranks until the run is done, nothing may start it again, or the allocation is given back.

        Returns:
            The exit code of the batch job.
        """
        self._close_unfinished()
        verdict = self._without_progress(Verdict("lost", "an earlier start ended with its supervisor"))
        if verdict is not None:
            return self._end("no restart", verdict)
        while True:
            number, folder = new_attempt_folder(self.job, self.allocation.job_id, self.allocation.restart)
            start = Start(self.job, self.profile, self.allocation, number, folder, self.end_time, self.stop)
            attempt, verdict = start.run()
            verdict = self._repeated(verdict, attempt)
            close_attempt(self.job, attempt, verdict)
            if verdict.name == "stopped" and not attempt.progress and self._is_near_end():
                # Jobs of that length would follow each other for ever.
                verdict = replace(verdict, name="out of time")
                attempt.verdict = verdict.name
            say(f"start {attempt.attempt}: {verdict.name}: {verdict.reason}")
            action, verdict = self._decide(start, attempt, verdict)
            attempt.action = action
            add_line(self.job, attempt)
            if action != "restart":
                return self._end(action, verdict)

    def _is_near_end(self) -> bool:
        return self.end_time is not None and time.time() >= self.end_time - self.profile.restarts.warning_seconds - 60

    def _decide(self, start: Start, attempt: Attempt, verdict: Verdict) -> tuple[Action, Verdict]:
        """What follows a start, and why."""
        if verdict.name == "finished":
            return "done", verdict
        if verdict.name in FINAL:
            return "no restart", verdict
        if verdict.name == "cancelled" or self.stop.by_person:
            return "end", verdict
        if verdict.name == "stopped":
            return "leave", verdict
        stuck = self._without_progress(verdict, attempt)
        if stuck is not None:
            return "no restart", stuck
        used_up = start.number > self.profile.restarts.in_job_restarts
        if self.stop.reason is not None or used_up or not start.may_follow():
            return "leave", verdict
        return "restart", verdict

    def _without_progress(self, verdict: Verdict, last: Attempt | None = None) -> Verdict | None:
        """The verdict that ends a run whose starts come to nothing, or None."""
        most = self.profile.restarts.attempts_without_progress
        known = [*read_attempts(self.job.slurm_dir), *([last] if last else [])]
        failed = without_progress(known, self.job.folder.name)
        if len(failed) < most:
            return None
        lines = [
            f"  {attempt.attempt} on {', '.join(attempt.nodes)}: {attempt.verdict}: {attempt.reason}"
            for attempt in failed
        ]
        said = f"{len(failed)} starts in a row left no newer checkpoint (restarts.attempts_without_progress={most}):"
        return replace(verdict, reason="\n".join([said, *lines[-most:]]))

    def _repeated(self, verdict: Verdict, attempt: Attempt) -> Verdict:
        """A node where the first failure lay twice in a row is to blame, if there are others to compare with."""
        again = verdict.suspect is not None and verdict.suspect == self.suspect and len(attempt.nodes) > 1
        self.suspect = verdict.suspect
        if not again or verdict.suspect is None:
            return verdict
        blamed = replace(verdict, culprits=(verdict.suspect,), reason=f"{verdict.reason}; the second time in a row")
        self._avoid(verdict.suspect, blamed.reason)
        return blamed

    def _avoid(self, node: str, reason: str) -> None:
        hours = self.profile.restarts.exclude_hours
        say(f"{node} is left out for {hours:g} hours: crash: {reason}")
        add_bad_node(self.job.slurm_dir, node, reason=reason, check="crash", hours=hours, job=self.allocation.job_id)

    def _end(self, action: Action, verdict: Verdict) -> int:
        if action == "done":
            self._leave_word(DONE, verdict.reason)
            return 0
        if action == "no restart":
            self._leave_word(NO_RESTART, f"{verdict.name}: {verdict.reason}")
            return EXIT_CODES.get(verdict.name, NO_RESTART_EXIT_CODE)
        if action == "end":
            return STOPPED_EXIT_CODE
        return self._leave(verdict)

    def _leave(self, verdict: Verdict) -> int:
        """Go on in the next job of the chain, or in the same one after a requeue."""
        avoided = [*self._excluded_by_profile(), *read_bad_nodes(self.job.slurm_dir)]
        successors = waiting_successors(self.job.folder, self.allocation.job_id)
        if successors:
            exclude_nodes(successors, avoided)
            say(f"job {successors[0]} of the chain goes on: {verdict.reason}")
        elif not self.profile.restarts.requeue:
            say("nothing goes on by itself (restarts.requeue is false): megatron-video slurm resume")
        else:
            self._requeue(verdict, avoided)
        return STOPPED_EXIT_CODE

    def _requeue(self, verdict: Verdict, avoided: Sequence[str]) -> None:
        without = f" without {', '.join(avoided)}" if avoided else ""
        say(f"back into the queue{without}: {verdict.reason}")
        refused = self.allocation.requeue(avoided)
        if refused is not None:
            # Where SLURM ends the job by itself, at a lost node or a preemption, it also requeues it.
            say(f"not requeued from here: {refused}; if nothing goes on: megatron-video slurm resume")

    def _excluded_by_profile(self) -> list[str]:
        return [node for listed in self.profile.slurm.exclude for node in expand(listed)]

    def _close_unfinished(self) -> None:
        """Write the lines of starts whose supervisor died with its node."""
        for _, attempt in unfinished_attempts(self.job):
            states = states_of(attempt.nodes, patience=30.0)
            dead = tuple(node for node in attempt.nodes if is_dead(states.get(node, "")))
            why = f"SLURM gave up {', '.join(dead)}" if dead else "the first node failed, or SLURM killed the job"
            verdict = Verdict("node failed" if dead else "lost", f"ended with its supervisor: {why}", dead)
            close_attempt(self.job, attempt, verdict)
            attempt.action = "requeued by SLURM"
            add_line(self.job, attempt)
            say(f"start {attempt.attempt}: {verdict.name}: {verdict.reason}")

    def _leave_word(self, name: str, reason: str) -> None:
        write_atomically(self.job.slurm_dir / name, f"{reason}\n".encode())
        say(f"{name}: {reason}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
