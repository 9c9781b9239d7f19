"""Where the folders of submitted jobs are: a line a submission in the user's state folder.

SLURM forgets a job minutes after its end, and many sites keep no accounts; the folders stay.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_video.errors import UserError
from slurm import scheduler
from slurm.job import JOB_FILE, SLURM_FOLDER, SUBMITTED_FILE, Job, newest_folder
from slurm.submitted import read_submitted

KNOWN_FILE = "slurm-jobs.jsonl"


@dataclass(frozen=True)
class KnownJob:
    """A submission."""

    jobs: list[str]
    name: str
    folder: str


def remember(job: Job, numbers: list[str]) -> None:
    """Note a submission. Without a writable home it is found by its run's folder only."""
    line = json.dumps(asdict(KnownJob(numbers, job.name, str(job.folder)))) + "\n"
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)


def known_jobs() -> Iterator[KnownJob]:
    """Submissions of this user whose folders are still there, newest first."""
    try:
        lines = _file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in reversed(lines):
        # A line that was cut short, or of another version.
        with contextlib.suppress(ValueError, TypeError):
            known = KnownJob(**json.loads(line))
            if (Path(known.folder) / SUBMITTED_FILE).exists():
                yield known


def find_folder(what: str) -> Path:
    """The job's folder that a run's folder, a job's folder, a job's name or SLURM's number means.

    Raises:
        UserError: it means none.
    """
    path = Path(what)
    if (path / JOB_FILE).exists():
        return path.resolve()
    if (path / SLURM_FOLDER).is_dir():
        return newest_folder(path.absolute())
    number = what.split("_")[0]
    for known in known_jobs():
        if what == known.name or number in known.jobs:
            return Path(known.folder)
    folder = _by_queue(number) if number.isdigit() else None
    if folder is None:
        raise UserError(
            f"{what}: neither a run's folder with submitted jobs, nor the name or number of a job that was submitted "
            "with megatron-video slurm; megatron-video slurm status lists them"
        )
    return folder


def _by_queue(number: str) -> Path | None:
    """Another user's job, or one submitted from a machine with another home: SLURM knows its batch script."""
    try:
        record = scheduler.job_records(number)[0]
    except scheduler.SlurmError:
        return None
    for word in record.get("Command", "").split():
        folder = next((path for path in Path(word).parents if (path / JOB_FILE).exists()), None)
        if folder is not None and number in read_submitted(folder).jobs:
            return folder
    return None


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "megatron-video" / KNOWN_FILE
