"""Submitting a chain: all of its jobs or none, and later only what is not done yet.

The jobs that wait for nothing are held until every job of the chain is queued and recorded, so that a submission that
is interrupted, or killed, never leaves half a chain at work.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_video.errors import UserError
from slurm import scheduler
from slurm.chain import Chain, ChainStage, spread_units
from slurm.chain_record import ChainRecord, JobOfStage, chains_of
from slurm.chain_status import StageState, chain_states
from slurm.checks import Plan, check
from slurm.job import STOP, Job, next_folder
from slurm.known_jobs import remember
from slurm.profile import ClusterProfile
from slurm.sampling_stage import copy_problems
from slurm.snapshot import source_root
from slurm.submission import Request
from slurm.submit import sbatch_options, submit_job
from slurm.submitted import LATEST
from slurm.training_stage import training_request

SCRIPT = "task.sbatch"
_MIB_OF_GIB = 1024


@dataclass(frozen=True)
class Submission:
    """A chain that is being submitted."""

    record: ChainRecord
    profile: ClusterProfile
    after: Sequence[str] = ()
    """What the first stages wait for, as --dependency takes it."""
    left_out: Sequence[str] = ()
    """Checks that are not made."""
    local_run_folder: bool = False
    resuming: bool = False
    """A training that was asked to stop is started again."""
    code_of: Path | None = None
    """Folder of a job whose code is used again."""
    live: dict[str, str] = field(default_factory=dict)
    """Stages that are in the queue, and their numbers."""
    done: frozenset[str] = frozenset()
    """Stages of which nothing is left."""
    held: Sequence[str] = ()
    """Jobs that a submission which was killed left held."""

    def requests(self, todo: Sequence[tuple[ChainStage, list[int]]]) -> list[Request]:
        """The jobs of some stages with the units they shall do; nothing is written yet."""
        most = max_array_size() if any(stage.array for stage, _ in todo) else 1
        return [self._request(stage, units, most) for stage, units in todo]

    def _request(self, stage: ChainStage, units: list[int], most: int) -> Request:
        name = f"{self.record.chain.name}-{stage.name}"
        if stage.is_training:
            return training_request(stage, name, self.profile, self.record)
        tasks = spread_units(units, most)
        run_dir = (self.record.cwd / self.record.chain.run_dir).absolute()
        job = Job(
            name=name,
            kind=stage.kind,
            run_dir=run_dir,
            folder=run_dir / "slurm" / f"NNNN-{name}",
            command=stage.job_command,
            nodes=stage.nodes,
            gpus_per_node=min(stage.gpus, self.profile.slurm.gpus_per_node),
            cpus=stage.cpus,
            memory_mib=None if stage.memory_gb is None else int(stage.memory_gb * _MIB_OF_GIB),
            seconds=stage.seconds,
            cwd=self.record.cwd,
            tasks=None if stage.array is None else len(tasks),
            at_once=stage.throttle,
            options={
                "chain": str(self.record.folder),
                "stage_dir": str(self.record.stage_dir(stage.name)),
                "units": tasks,
                "count": stage.units,
                "ranks_per_node": stage.ranks,
                "locks": stage.locks,
            },
        )
        # A node that goes down gives its tasks to another; what is done of them is done.
        return Request(job, self.profile, SCRIPT, options=["--requeue"], problems=copy_problems(stage))

    def problems(self, requests: Sequence[Request]) -> tuple[list[str], list[str]]:
        """Why the chain cannot be submitted, and notes; each with the stage's name."""
        problems: dict[str, None] = {}
        notes: dict[str, None] = {}
        for request in requests:
            plan = Plan(
                job=request.job,
                profile=self.profile,
                sbatch=sbatch_options(request.job, self.profile, request.options),
                script=source_root() / "slurm" / request.script,
                warned=request.warned,
                local_run_folder=self.local_run_folder,
                resuming=self.resuming,
            )
            # Stages of one chain work beside each other; another chain on the same output is looked for apart.
            found = check(plan, [*self.left_out, "live"])
            problems |= dict.fromkeys([f"{request.job.name}: {text}" for text in (*request.problems, *found.problems)])
            notes |= dict.fromkeys(found.notes)
        return list(problems), [note for note in notes if "to start at" not in note]

    def submit(self, todo: Sequence[tuple[ChainStage, list[int]]], requests: Sequence[Request]) -> list[str]:
        """Submit stages in order, each as its request; SLURM's numbers.

        Raises:
            UserError: SLURM refused one; then none is left in the queue.
        """
        numbers, roots, folders = dict(self.live), list[str](), list[Path]()
        code_of = self.code_of
        before = {name: list(jobs) for name, jobs in self.record.jobs.items()}
        try:
            for (stage, units), request in zip(todo, requests, strict=True):
                waits = self._waits(stage, numbers)
                held = [] if waits else ["--hold"]
                folder = next_folder(request.job.run_dir, request.job.name)
                folders.append(folder)
                if self.resuming and stage.is_training:
                    (request.job.slurm_dir / STOP).unlink(missing_ok=True)
                command = [word.replace("{folder}", str(folder)) for word in request.job.command]
                job = replace(request.job, folder=folder, command=command, after=waits or list(self.after))
                number = submit_job(
                    job,
                    self.profile,
                    script=request.script,
                    options=[*request.options, *held],
                    config=request.config,
                    code_of=code_of,
                )
                code_of = code_of or job.folder
                numbers[stage.name] = number
                roots += [number] if held else []
                self.record.jobs.setdefault(stage.name, []).append(JobOfStage(number, str(job.folder), units))
                self.record.save()
                remember(job, [number])
            if roots or self.held:
                scheduler.ask("scontrol", "release", *roots, *self.held)
        except BaseException:
            self._undo([number for name, number in numbers.items() if name not in self.live], folders, before)
            raise
        return [numbers[stage.name] for stage, _ in todo]

    def _waits(self, stage: ChainStage, numbers: dict[str, str]) -> list[str]:
        chain = self.record.chain
        wanted = [f"afterok:{numbers[name]}" for name in chain.awaited(stage) if name not in self.done]
        return wanted + [f"afterany:{numbers[name]}" for name in stage.after_any if name in numbers]

    def _undo(self, numbers: list[str], folders: list[Path], before: dict[str, list[JobOfStage]]) -> None:
        if numbers:
            scheduler.ask("scancel", *numbers)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            latest = folder.parent / LATEST
            if latest.is_symlink() and not latest.exists():
                latest.unlink()
        self.record.jobs = before
        if before:
            self.record.save()
        else:
            shutil.rmtree(self.record.folder, ignore_errors=True)


def all_units(chain: Chain) -> list[tuple[ChainStage, list[int]]]:
    """Every stage with all of its units, as a chain is submitted first."""
    return [(stage, list(range(stage.units))) for stage in chain.stages]


def units_left(record: ChainRecord, states: Sequence[StageState]) -> list[tuple[ChainStage, list[int]]]:
    """The stages that are neither done nor in the queue, with the units that are not done.

    Raises:
        UserError: a stage that failed in part is still at work.
    """
    for state in states:
        if state.live and state.failed:
            raise UserError(
                f"stage {state.name}: job {state.jobs[-1]} is still at work on the units that did not fail; wait for "
                f"its end, or cancel it (megatron-video slurm cancel {state.jobs[-1]})"
            )
    return [(record.chain.stage(state.name), state.left) for state in states if not state.live and state.left]


def rivals(chain: Chain) -> list[str]:
    """Lines about chains that are at work on the same output, or under the same name in the same folder."""
    found = []
    run_dir = Path(chain.run_dir).absolute()
    for record in chains_of(run_dir):
        same = record.chain.output == chain.output if chain.output else record.chain.name == chain.name
        live = [state for state in chain_states(record) if state.live] if same else []
        if live:
            numbers = ", ".join(state.jobs[-1] for state in live)
            what = chain.output or str(record.folder)
            found.append(
                f"{what}: a chain is at work on it (job {numbers}, submitted {record.time}); follow it with "
                f"megatron-video slurm status {what}, or end it with megatron-video slurm cancel {what}"
            )
    return found


def max_array_size() -> int:
    """Most tasks of an array that the cluster allows.

    Raises:
        SlurmError: the controller is away.
    """
    for line in scheduler.ask("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value))
    return 1
