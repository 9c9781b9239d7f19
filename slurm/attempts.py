"""Starts of a job: each has a folder, and a line in RUN/slurm/attempts.jsonl once it has ended.

attempts/<job id>.<restart>.<start>/ of the job's folder holds
    attempt.json          the line as it was known at the start
    environment.txt       of the batch process, without secrets
    versions.json         of SLURM and of the Python around the job
    task.env              what every task sourced; srun.txt: the command; srun.log: what it said
    nodes/NODE.log        output of the node's tasks; NODE.json: its ranks, packages; NODE.nvidia-smi.txt
    ranks/                with torchrun, the output of every rank apart
    failures/             exit code and error of every rank that failed
    stacks/               of every rank, when the start was ended because nothing moved
    preflight/            what the nodes' checks found
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from megatron_video.files import write_atomically
from slurm.job import ATTEMPTS_FILE, ATTEMPTS_FOLDER, Job
from slurm.rank import NODES_FOLDER

ATTEMPT_FILE, ENVIRONMENT_FILE, VERSIONS_FILE = "attempt.json", "environment.txt", "versions.json"
# Ends that say nothing about whether the training can make progress.
NEUTRAL = ("stopped", "cancelled")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE|COOKIE", re.IGNORECASE)


@dataclass
class Attempt:
    """One start of a job."""

    attempt: str
    """<job id>.<restart>.<start>."""
    submission: str
    """Name of the job's folder: starts of one submission are counted together."""
    job: str
    began: str
    """ISO 8601, UTC."""
    nodes: list[str]
    """Those the ranks ran on."""
    spares: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Nodes of the allocation that were not used -> why."""
    step_before: int | None = None
    checkpoint_before: str | None = None
    """What it continued from, relative to the run's folder."""
    checkpoints_before: dict[str, int] = field(default_factory=dict)
    """Step of the newest checkpoint, of a curriculum by stage."""
    ended: str | None = None
    seconds: float | None = None
    step_after: int | None = None
    """Last step it did."""
    checkpoint_after: str | None = None
    progress: bool = False
    """Whether it left a newer complete checkpoint than it found."""
    verdict: str | None = None
    reason: str = ""
    culprits: list[str] = field(default_factory=list)
    """Nodes that the reason names."""
    action: str = ""
    """What followed: restart, requeue, ..."""


def new_attempt_folder(job: Job, job_id: str, restart: int) -> tuple[int, Path]:
    """Make the folder of the next start; its number inside this allocation, from 1, and the folder.

    Raises:
        OSError: the job's folder cannot be written to.
    """
    parent = job.folder / ATTEMPTS_FOLDER
    start = 1 + len(list(parent.glob(f"{job_id}.{restart}.*")))
    folder = parent / f"{job_id}.{restart}.{start}"
    (folder / NODES_FOLDER).mkdir(parents=True)
    return start, folder


def save_attempt(folder: Path, attempt: Attempt) -> None:
    """Write attempt.json."""
    write_atomically(folder / ATTEMPT_FILE, (json.dumps(asdict(attempt), indent=1) + "\n").encode())


def add_line(job: Job, attempt: Attempt) -> None:
    """Add the line of a start that has ended to RUN/slurm/attempts.jsonl."""
    path = job.slurm_dir / ATTEMPTS_FILE
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # A line that a full disk or a power loss tore must not spoil this one.
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, (b"\n" if torn else b"") + json.dumps(asdict(attempt)).encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)


def read_attempts(slurm_dir: Path) -> list[Attempt]:
    """Starts of all jobs of a run that have ended, oldest first; lines that are torn are left out."""
    path = slurm_dir / ATTEMPTS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = [_parse(line) for line in text.splitlines()]
    return [attempt for attempt in found if attempt is not None]


def unfinished_attempts(job: Job) -> list[tuple[Path, Attempt]]:
    """Starts that have a folder and no line: their supervisor died with its node. Oldest first."""
    told = {attempt.attempt for attempt in read_attempts(job.slurm_dir)}
    found = []
    for path in (job.folder / ATTEMPTS_FOLDER).glob(f"*/{ATTEMPT_FILE}"):
        attempt = _parse(path.read_text(encoding="utf-8"))
        if attempt is not None and attempt.attempt not in told:
            found.append((path.parent, attempt))
    return sorted(found, key=lambda item: item[1].began)


def without_progress(attempts: Sequence[Attempt], submission: str) -> list[Attempt]:
    """The last starts of a submission that failed without leaving a newer checkpoint, oldest first."""
    found: list[Attempt] = []
    for attempt in reversed([attempt for attempt in attempts if attempt.submission == submission]):
        if attempt.progress:
            break
        if attempt.verdict not in NEUTRAL:
            found.insert(0, attempt)
    return found


def record_surroundings(folder: Path, by_name_only: Sequence[str]) -> None:
    """Write the batch process's environment and the versions around it.

    Args:
        folder: of the start.
        by_name_only: variables whose values are not written, besides those that look like secrets.
    """
    hidden = "(not written)"
    lines = [
        f"{name}={hidden if name in by_name_only or _SECRET.search(name) else value}"
        for name, value in sorted(os.environ.items())
    ]
    (folder / ENVIRONMENT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    versions = {"slurm": _first_line("sinfo", "--version"), "python": platform.python_version(), **_platform()}
    (folder / VERSIONS_FILE).write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")


def now_text() -> str:
    """The time, as attempts hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def seconds_since(began: str) -> float:
    """Seconds from a time as attempts hold it until now."""
    return max(0.0, time.time() - datetime.fromisoformat(began).timestamp())


def _platform() -> dict[str, str]:
    return {"host": platform.node(), "kernel": platform.release()}


def _first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _parse(text: str) -> Attempt | None:
    try:
        values = json.loads(text)
        known = {item.name for item in fields(Attempt)}
        return Attempt(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError):
        return None
