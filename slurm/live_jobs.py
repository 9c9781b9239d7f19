"""Jobs in the queue that a new one must not run beside: of the same name, or of the same run."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_video.errors import UserError
from slurm import scheduler
from slurm.job import Job, load_job
from slurm.scheduler import QueuedJob
from slurm.submitted import job_folders, read_submitted


def competitors(job: Job) -> Iterator[str]:
    """A line for every live job of this name or in this run's folder, but for those that the new job waits for.

    Raises:
        SlurmError: the queue cannot be read.
    """
    found = scheduler.queued(f"--name={job.name}", f"--user={getpass.getuser()}")
    told = list(dict.fromkeys(base_number(live.job_id) for live in found))
    if told:
        yield (
            f"--name {job.name}: job {', '.join(told)} of this name is in the queue; wait for it, cancel it "
            f"(megatron-video slurm cancel {told[0]}), or give another --name"
        )
    awaited = _awaited(job)
    for live in live_jobs(job.run_dir):
        number = base_number(live.job_id)
        if number not in awaited and number not in told:
            yield (
                f"run folder {job.run_dir}: job {live.job_id} ({live.name}, {live.state}) works in it; wait for it, "
                f"let the new one wait for it (--after {number}), or cancel it (megatron-video slurm cancel {number})"
            )
            told.append(number)


def live_jobs(run_dir: Path, patience: float = 60.0) -> list[QueuedJob]:
    """Jobs of a run that are in the queue.

    Raises:
        SlurmError: the queue cannot be read.
    """
    names = {number: folder.name for folder in job_folders(run_dir) for number in read_submitted(folder).jobs}
    if not names:
        return []
    found = scheduler.queued(f"--jobs={','.join(names)}", patience=patience)
    # A controller that lost its state begins to count anew; the number is then another job's.
    return [live for live in found if names.get(base_number(live.job_id), "").endswith(f"-{live.name}")]


def base_number(job_id: str) -> str:
    """Number of the array that a task belongs to, or of the job: 17_3 -> 17."""
    return job_id.split("_")[0]


def numbers_in(dependencies: Sequence[str]) -> set[str]:
    """Job numbers in dependencies: afterok:17:18 -> 17, 18."""
    return {number for dependency in dependencies for number in re.findall(r":(\d+)", dependency)}


def _awaited(job: Job) -> set[str]:
    """Jobs of this run that end before `job` starts: those it waits for, those that they wait for, and so on."""
    waits_for: dict[str, set[str]] = {}
    for folder in job_folders(job.run_dir):
        try:
            after = numbers_in(load_job(folder)[0].after)
        except UserError:
            # Of an older version; it says nothing of what it waited for.
            continue
        numbers = read_submitted(folder).jobs
        for number in numbers:
            waits_for[number] = after | set(numbers[: numbers.index(number)])
    found, ahead = set[str](), numbers_in(job.after)
    while ahead:
        number = ahead.pop()
        found.add(number)
        ahead |= waits_for.get(number, set()) - found
    return found
