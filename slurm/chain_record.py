"""What is kept of a chain: RUN/slurm/chains/<number>-<name>/ with chain.json, and results and logs of every stage."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_video.config_io import build_config, config_to_dict
from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from slurm.chain import Chain
from slurm.job import SLURM_FOLDER, SUBMITTED_FILE, load_job
from slurm.submitted import read_submitted

CHAINS_FOLDER, CHAIN_FILE = "chains", "chain.json"


@dataclass(frozen=True)
class JobOfStage:
    """One submission of a stage."""

    number: str
    """SLURM's."""
    folder: str
    units: list[int]
    """Those that it was to do."""


@dataclass
class ChainRecord:
    """A chain and what was submitted of it."""

    folder: Path
    chain: Chain
    cwd: Path
    """Where its commands run."""
    jobs: dict[str, list[JobOfStage]] = field(default_factory=dict)
    """Stage -> its submissions, oldest first."""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    user: str = field(default_factory=getpass.getuser)
    host: str = field(default_factory=socket.gethostname)
    command: list[str] = field(default_factory=lambda: ["megatron-video", *sys.argv[1:]])
    """As it was typed."""

    def stage_dir(self, stage: str) -> Path:
        """Folder of a stage's results and logs."""
        return self.folder / stage

    def newest(self, stage: str) -> JobOfStage | None:
        """The last submission of a stage."""
        return self.jobs.get(stage, [None])[-1]

    def numbers(self) -> list[str]:
        """SLURM's numbers of all jobs, oldest first."""
        return [job.number for jobs in self.jobs.values() for job in jobs]

    def save(self) -> None:
        """Write chain.json."""
        values = asdict(self) | {"chain": config_to_dict(self.chain), "cwd": str(self.cwd)}
        del values["folder"]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CHAIN_FILE, (json.dumps(values, indent=1) + "\n").encode())


def load_record(folder: Path) -> ChainRecord:
    """Read a chain's folder.

    Raises:
        UserError: it holds none, or one of another version.
    """
    path = folder / CHAIN_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        jobs = {stage: [JobOfStage(**job) for job in entries] for stage, entries in values.pop("jobs").items()}
        chain = build_config(Chain, values.pop("chain"), origin=str(path))
        return ChainRecord(folder=folder, chain=chain, jobs=jobs, cwd=Path(values.pop("cwd")), **values)
    except FileNotFoundError:
        raise UserError(f"{folder}: no {CHAIN_FILE}; this is no folder of a submitted chain") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not readable: {error}") from None


def new_record(chain: Chain) -> ChainRecord:
    """The record of a chain that is about to be submitted; its folder is made.

    Raises:
        OSError: the run's folder cannot be written to.
    """
    parent = Path(chain.run_dir).absolute() / SLURM_FOLDER / CHAINS_FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name.split("-")[0]) for path in parent.glob("[0-9][0-9][0-9][0-9]-*")]
    folder = parent / f"{max(numbers, default=0) + 1:04d}-{chain.name}"
    folder.mkdir()
    return ChainRecord(folder, chain, Path.cwd())


def chains_of(run_dir: Path) -> list[ChainRecord]:
    """Chains of a run's folder, oldest first."""
    parent = run_dir / SLURM_FOLDER / CHAINS_FOLDER
    return [load_record(path.parent) for path in sorted(parent.glob(f"[0-9][0-9][0-9][0-9]-*/{CHAIN_FILE}"))]


def find_chain(what: str) -> ChainRecord | None:
    """The chain that a folder, what it makes, its name or one of its jobs means; None if it means none.

    A folder whose newest job is of no chain means that job.
    """
    path = Path(what).absolute()
    if (path / CHAIN_FILE).is_file():
        return load_record(path)
    made = [record for record in chains_of(path.parent) if _output(record) == path]
    if made:
        return made[-1]
    here = chains_of(path)
    if here and here[-1].time >= _last_plain_job(path):
        return here[-1]
    return _of_a_job(what)


def _of_a_job(what: str) -> ChainRecord | None:
    from slurm.known_jobs import find_folder

    try:
        job, _ = load_job(find_folder(what))
    except UserError:
        return None
    folder = job.options.get("chain")
    return load_record(Path(folder)) if folder and (Path(folder) / CHAIN_FILE).is_file() else None


def _output(record: ChainRecord) -> Path | None:
    return record.cwd / record.chain.output if record.chain.output else None


def _last_plain_job(run_dir: Path) -> str:
    """When the newest job of no chain was submitted; "" if there is none."""
    folders = [path.parent for path in (run_dir / SLURM_FOLDER).glob(f"[0-9][0-9][0-9][0-9]-*/{SUBMITTED_FILE}")]
    times = [read_submitted(folder).time for folder in folders if not load_job(folder)[0].options.get("chain")]
    return max(times, default="")
