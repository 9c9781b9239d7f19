"""How a job stands: what SLURM says of it as far as SLURM still does, and what its run's folder says."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_video.config_io import read_values
from megatron_video.errors import UserError
from slurm import scheduler
from slurm.attempts import Attempt, read_attempts, unfinished_attempts
from slurm.bad_nodes import read_bad_nodes
from slurm.job import CONFIG_FILE, DONE, NO_RESTART, STOP, Job, load_job
from slurm.live_jobs import base_number
from slurm.results import is_done
from slurm.run_files import METRICS_FILE, last_step, latest_checkpoint, tail_lines
from slurm.scheduler import QueuedJob, SlurmAwayError, SlurmError
from slurm.submitted import read_submitted

_SMOOTHED_STEPS = 20
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
# Ends that nobody has to look after.
GOOD = ("running", "pending", "completing", "requeued", "configuring", "done", "completed")


@dataclass
class RunState:
    """One job; of a chain the one that is next or under way."""

    name: str
    kind: str
    run: str
    folder: str
    jobs: list[str]
    """All numbers of the submission."""
    state: str
    """pending, running, ..., as SLURM has it while the job is in the queue; done, stopped, no restart by the run's
    folder; else how SLURM ended it (failed, timeout, cancelled, ...); `unknown` while the controller is away."""
    job: str | None = None
    """Number of the one that the state is of."""
    reason: str = ""
    """Why it waits, or why it ended so."""
    nodes: str = ""
    """Host list of a running job."""
    nodes_wanted: int = 0
    seconds_left: int | None = None
    chained: list[str] = field(default_factory=list)
    """Jobs that wait behind this one."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Of an array: tasks in the queue by state."""
    starts: int = 0
    """Of the ranks, in all jobs of the run."""
    verdict: str | None = None
    """Of the last start that has ended."""
    progress: dict[str, Any] = field(default_factory=dict)
    """step, total_steps, stage, step_seconds, loss, silent_seconds, checkpoint, checkpoint_step, goodput."""
    bad_nodes: dict[str, str] = field(default_factory=dict)
    """Node -> why this run avoids it now."""

    @property
    def is_live(self) -> bool:
        """Whether a job of it is in the queue, as far as SLURM could be asked."""
        return self.job is not None

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Queue:
    """The queue at one moment; `error`: why it could not be read."""

    jobs: tuple[QueuedJob, ...]
    error: str = ""

    @staticmethod
    def read(numbers: Sequence[str], patience: float) -> Queue:
        """Of some jobs; with no more patience than this for a controller that is away."""
        if not numbers:
            return Queue(())
        try:
            return Queue(tuple(scheduler.queued(f"--jobs={','.join(numbers)}", patience=patience)))
        except SlurmError as error:
            return Queue((), error.said)

    def of(self, numbers: Sequence[str], name: str) -> list[QueuedJob]:
        """Those of one submission, in its order."""
        found = [live for live in self.jobs if live.name == name and base_number(live.job_id) in numbers]
        return sorted(found, key=lambda live: numbers.index(base_number(live.job_id)))


def job_numbers(folders: Sequence[Path]) -> list[str]:
    """SLURM's numbers of the jobs of some folders."""
    return [number for folder in folders for number in read_submitted(folder).jobs]


def run_state(folder: Path, queue: Queue) -> RunState:
    """How the job of a folder stands.

    Raises:
        UserError: the folder is not readable.
    """
    job, _ = load_job(folder)
    numbers = read_submitted(folder).jobs
    found = RunState(job.name, job.kind, str(job.run_dir), str(folder), numbers, state="unknown")
    found.nodes_wanted = job.nodes + job.spare_nodes
    _add_place(found, job, queue)
    _add_starts(found, job)
    found.progress = _progress(job)
    found.bad_nodes = {node: entry.reason for node, entry in _bad_nodes(job).items()}
    return found


def _add_place(found: RunState, job: Job, queue: Queue) -> None:
    """State, reason, nodes and what waits behind."""
    live = queue.of(found.jobs, job.name)
    if not live:
        found.state, found.reason = _over(found.jobs, job, queue)
        return
    now = next((one for one in live if one.state != "PENDING"), live[0])
    found.job, found.state, found.nodes = base_number(now.job_id), now.state.lower(), now.nodes
    found.seconds_left = now.seconds_left if now.state == "RUNNING" else None
    found.reason = "" if now.reason == "None" else now.reason
    found.chained = [one.job_id for one in live if one is not now and base_number(one.job_id) != found.job]
    if job.tasks is not None:
        states = [one.state.lower() for one in live]
        found.tasks = {state: states.count(state) for state in dict.fromkeys(states)}
    if (job.slurm_dir / STOP).exists():
        found.reason = f"told to stop: {_read(job.slurm_dir / STOP)}"


def _over(numbers: Sequence[str], job: Job, queue: Queue) -> tuple[str, str]:
    """State and reason of a job that is not in the queue, or may be in one that cannot be read."""
    for name, state in ((DONE, "done"), (NO_RESTART, "no restart"), (STOP, "stopped")):
        if (job.slurm_dir / name).exists() and not (queue.error and name == STOP):
            return state, _read(job.slurm_dir / name)
    if is_done(job.options):
        return "done", ""
    if queue.error:
        return "unknown", f"SLURM does not answer: {queue.error}"
    try:
        records = scheduler.job_records(numbers[-1])
    except SlurmAwayError as error:
        return "unknown", f"SLURM does not answer: {error.said}"
    except SlurmError:
        # Minutes after its end SLURM has forgotten it.
        return "ended", ""
    ends = list(dict.fromkeys(record.get("JobState", "").lower() for record in records))
    worst = next((end for end in ends if end not in GOOD), ends[0])
    reason = records[0].get("Reason", "None")
    return worst, "" if reason == "None" else reason


def _add_starts(found: RunState, job: Job) -> None:
    ended = read_attempts(job.slurm_dir)
    found.starts = len(ended) + len(unfinished_attempts(job))
    if ended:
        found.verdict = ended[-1].verdict
        found.reason = found.reason or (_first_line(ended[-1].reason) if not found.is_live else "")


def _progress(job: Job) -> dict[str, Any]:
    """Of a training: how far it is, how fast, and what it has saved."""
    metrics = [path for path in (job.run_dir / METRICS_FILE, *job.run_dir.glob(f"*/{METRICS_FILE}")) if path.exists()]
    found: dict[str, Any] = {"step": None, "total_steps": _total_steps(job.folder / CONFIG_FILE)}
    checkpoint = latest_checkpoint(job.run_dir)
    if checkpoint is not None:
        found |= {"checkpoint": checkpoint.folder, "checkpoint_step": checkpoint.step}
    if not metrics:
        return found
    newest = max(metrics, key=lambda path: path.stat().st_mtime)
    lines = [line for line in tail_lines(newest) if "loss" in line and "step" in line]
    found |= {"step": last_step(job.run_dir), "silent_seconds": max(0.0, time.time() - newest.stat().st_mtime)}
    if newest.parent != job.run_dir:
        found["stage"] = newest.parent.name
        found["total_steps"] = _total_steps(newest.parent / CONFIG_FILE)
    for name in ("loss", "step_seconds"):
        values = [line[name] for line in lines[-_SMOOTHED_STEPS:] if isinstance(line.get(name), int | float)]
        found[name] = statistics.median(values) if values else None
    if newest.parent == job.run_dir:
        starts = [*read_attempts(job.slurm_dir), *(attempt for _, attempt in unfinished_attempts(job))]
        found["goodput"] = _goodput(starts, found, newest)
    return found


def _goodput(starts: Sequence[Attempt], found: dict[str, Any], metrics: Path) -> float | None:
    """Share of the time since the first start that went into the steps there are, by a sample of their times.

    `megatron-video report` has the measured share; this one costs no reading of months of metrics.
    """
    seconds, last = _mean_step_seconds(metrics), found.get("step")
    if not starts or seconds is None or last is None:
        return None
    began = datetime.fromisoformat(starts[0].began).timestamp()
    elapsed = time.time() - float(found["silent_seconds"]) - began
    return min(1.0, (last - (starts[0].step_before or 0)) * seconds / elapsed) if elapsed > 0 else None


def _mean_step_seconds(metrics: Path) -> float | None:
    """Of the lines in a few places all over the file."""
    size, values = metrics.stat().st_size, []
    with metrics.open("rb") as file:
        for offset in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
            file.seek(offset)
            for line in file.read(_SAMPLE_BYTES).splitlines():
                # The first and the last line of a piece are torn.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    values.append(float(json.loads(line)["step_seconds"]))
    return statistics.mean(values) if values else None


def _total_steps(config: Path) -> int | None:
    if not config.exists():
        return None
    try:
        values = read_values(config)
    except UserError:
        return None
    if isinstance(values.get("training"), dict):
        return values["training"].get("steps")
    stages = values.get("stages")
    # Of the VAE; stages of a curriculum are a mapping, and each has a configuration of its own.
    return sum(stage["steps"] for stage in stages) if isinstance(stages, list) else None


def _bad_nodes(job: Job) -> dict[str, Any]:
    try:
        return dict(read_bad_nodes(job.slurm_dir))
    except UserError:
        return {}


def _read(path: Path) -> str:
    return _first_line(path.read_text(encoding="utf-8", errors="replace"))


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""
