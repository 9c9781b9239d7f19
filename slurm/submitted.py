"""The record of a submission, submitted.json: SLURM's numbers, when, by whom, with which command line and code."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from slurm.job import SLURM_FOLDER, SUBMITTED_FILE, Job

LATEST = "latest"


@dataclass(frozen=True)
class Submitted:
    """What submitted.json holds."""

    jobs: list[str]
    """SLURM's numbers, of a chain all of them in order; an array has one."""
    time: str
    """ISO 8601, UTC."""
    user: str
    host: str
    """Where it was submitted."""
    command: list[str]
    """As it was typed."""
    sbatch: list[str]
    """What sbatch was given."""
    script: str = ""
    """Batch script of this package, such as pretrain.sbatch."""
    options: list[str] = field(default_factory=list)
    """Those of `sbatch` that neither job nor profile tells."""


def record_submission(job: Job, numbers: list[str], sbatch: list[str], script: str, options: list[str]) -> None:
    """Write submitted.json, and let RUN/slurm/latest point to the job's folder."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = ["megatron-video", *sys.argv[1:]]
    record = Submitted(numbers, now, getpass.getuser(), socket.gethostname(), command, sbatch, script, options)
    write_atomically(job.folder / SUBMITTED_FILE, (json.dumps(asdict(record), indent=1) + "\n").encode())
    link = job.slurm_dir / f".{LATEST}.{job.folder.name}"
    link.unlink(missing_ok=True)
    link.symlink_to(job.folder.name)
    link.replace(job.slurm_dir / LATEST)


def read_submitted(folder: Path) -> Submitted:
    """The record of a job's folder.

    Raises:
        UserError: there is none, or it is not readable.
    """
    path = folder / SUBMITTED_FILE
    try:
        return Submitted(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {SUBMITTED_FILE}; this job was never handed to SLURM") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable: {error}") from None


def job_folders(run_dir: Path) -> list[Path]:
    """Folders of the jobs of a run that were submitted, oldest first."""
    return sorted(path.parent for path in (run_dir / SLURM_FOLDER).glob(f"[0-9][0-9][0-9][0-9]-*/{SUBMITTED_FILE}"))
