"""Tiny trainings as SLURM jobs, through the real batch script, and what they left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import Cluster
from fault_runs import SCRIPT, SETTINGS

from slurm.attempts import Attempt, read_attempts
from slurm.job import DONE, NO_RESTART, Job, next_folder
from slurm.launch import training_options
from slurm.profile import ClusterProfile, load_profile
from slurm.submit import submit_job

# Starts of ranks take long on a machine with more processes than cores; nothing here waits for a limit of the job.
MINUTES = 20
SLOW = {"kind": "sleep", "rank": 0, "step": 0, "last": 999, "seconds": 0.4}
"""A fault that gives a test the time to disturb a step."""


def profile(*overrides: str) -> ClusterProfile:
    """A profile of the cluster of tests/slurm/run.sh, without GPUs."""
    return load_profile(Path(__file__).parent / "training_profile.yaml", overrides)


@dataclass(frozen=True)
class TrainingJob:
    """A job that was submitted."""

    cluster: Cluster
    job: Job
    number: str

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir

    def wait(self, seconds: float = 900.0) -> str:
        """Wait until the job has left the queue; its last state."""
        return self.cluster.wait(self.number, seconds)[0]

    def wait_for(self, what: Callable[[], bool], seconds: float = 900.0) -> None:
        """Wait for something that the running job does."""
        deadline = time.monotonic() + seconds
        while True:
            ended = any((self.job.slurm_dir / name).exists() for name in (DONE, NO_RESTART))
            if what():
                return
            assert not ended, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        """Wait until so many steps are done, in any life."""
        self.wait_for(lambda: max(self.steps(), default=0) >= step)

    def log(self) -> str:
        """Of the batch process."""
        return "\n".join(path.read_text() for path in sorted(self.job.folder.glob("slurm-*.out")))

    def attempts(self) -> list[Attempt]:
        return read_attempts(self.job.slurm_dir)

    def two_attempts(self) -> tuple[Attempt, Attempt]:
        """The starts of a job that had one accident."""
        first, *others = self.attempts()
        assert len(others) == 1, self.log()
        return first, others[0]

    def verdict_file(self, name: str) -> str:
        return (self.job.slurm_dir / name).read_text()

    def steps(self) -> list[int]:
        """Steps in the order they were done, by all lives."""
        return [line["step"] for line in self.metrics()]

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, float]:
        """Loss by step, as the last life that did it has it."""
        return {line["step"]: line["loss"] for line in self.metrics()}


def submit_training(
    cluster: Cluster,
    folder: Path,
    name: str,
    *overrides: str,
    profile: ClusterProfile,
    nodes: int = 2,
    spares: int = 0,
    minutes: int = MINUTES,
    faults: list[dict[str, Any]] | None = None,
    chain: int = 1,
    code_of: Path | None = None,
) -> TrainingJob:
    """Submit a tiny training of shards in `folder`/shards; `faults` as tests/faulty_pretrain.py takes them."""
    run_dir = folder / name
    (folder / "empty.yaml").touch()
    marks = folder / f"{name}_marks"
    marks.mkdir(exist_ok=True)
    environment = {"FAULTS": json.dumps(faults or []), "FAULT_MARKS": str(marks)}
    environment["PYTHONPATH"] = str(SCRIPT.parent)
    profile.environment.update(environment)
    files = [f"run.output_dir={run_dir}", f"data.shards=[{folder / 'shards'}]"]
    start = [str(SCRIPT)] if faults else ["-m", "training.pretrain"]
    job = Job(
        name=name,
        kind="pretrain",
        run_dir=run_dir,
        folder=next_folder(run_dir, name),
        command=[*start, "--config", str(folder / "empty.yaml"), *SETTINGS, *files, *overrides],
        nodes=nodes,
        spare_nodes=spares,
        seconds=60 * minutes,
    )
    options = training_options(job, profile)
    number = submit_job(job, profile, script="pretrain.sbatch", options=options, chain=chain, code_of=code_of)
    return TrainingJob(cluster, job, number)
