"""A job as it is submitted: one folder holds all of it, and the batch script is told nothing but that folder.

RUN/slurm/<number>-<name>/
    job.json        this module's Job, read by what runs beside the job
    profile.yaml    the resolved profile
    job.env         what the batch script sources: paths and the profile's environment
    config.yaml     the resolved configuration of a training
    code/           the code as it was submitted
    submitted.json  SLURM's number(s) of the job, time, command line, who, where
    attempts/<job id>.<restart>.<start>/   one start of the job: node logs, preflight, verdict
RUN/slurm/latest    link to the newest of them
RUN/slurm/DONE, NO_RESTART, STOP      verdicts, as files: exit codes do not survive srun and torchrun
RUN/slurm/attempts.jsonl              a line for every start of a job of this run
RUN/slurm/bad_nodes.json              nodes that this run avoids, why, and until when
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_video.config_io import build_config, config_to_dict, save_config
from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from slurm.profile import ClusterProfile, load_profile

SLURM_FOLDER = "slurm"
JOB_FILE, PROFILE_FILE, ENVIRONMENT_FILE, CONFIG_FILE = "job.json", "profile.yaml", "job.env", "config.yaml"
CODE_FOLDER, SUBMITTED_FILE, ATTEMPTS_FOLDER = "code", "submitted.json", "attempts"
# In RUN/slurm: the run is finished; nothing may start it again (the file says why); a person asked it to stop.
DONE, NO_RESTART, STOP = "DONE", "NO_RESTART", "STOP"
ATTEMPTS_FILE, BAD_NODES_FILE = "attempts.jsonl", "bad_nodes.json"

Kind = Literal["pretrain", "curriculum", "vae", "dpo", "data", "convert", "evaluate", "command"]


@dataclass(frozen=True)
class Job:
    """One job, or one array of tasks."""

    name: str
    """--job-name: one live job of a name for each user."""
    kind: Kind
    run_dir: Path
    """Folder of what the job makes: run.output_dir of a training, the folder of the output of other stages."""
    folder: Path
    """The job's own folder, run_dir/slurm/<number>-<name>."""
    command: list[str]
    """Trainings: arguments of Python after the launcher, ["-m", "training.pretrain", "--config", ...]. Others: words of
    a `megatron-video` command; in arrays {task} and {tasks} stand for the task's number and their count."""
    nodes: int = 1
    spare_nodes: int = 0
    """Further nodes of the allocation that take the place of those that fail."""
    gpus_per_node: int = 0
    cpus: int | None = None
    """CPUs of each node; None: what the profile says. A job that names them leaves the rest of the node to others."""
    memory_mib: int | None = None
    """Memory of each node; None: what the profile says."""
    seconds: int | None = None
    """Wall time; None: the partition's limit."""
    cwd: Path = field(default_factory=Path.cwd)
    """Where the job runs: where it was submitted, so that relative paths mean what they meant there."""
    tasks: int | None = None
    """Of an array; None: no array."""
    at_once: int | None = None
    """Most tasks of the array that run at once."""
    after: list[str] = field(default_factory=list)
    """Dependencies as --dependency takes them: afterok:17."""
    options: dict[str, Any] = field(default_factory=dict)
    """What only this kind has."""

    @property
    def slurm_dir(self) -> Path:
        """RUN/slurm, which all jobs of the run share."""
        return self.run_dir / SLURM_FOLDER

    @property
    def code(self) -> Path:
        """The code that the job runs."""
        return self.folder / CODE_FOLDER

    def save(self, profile: ClusterProfile) -> None:
        """Write job.json, profile.yaml and job.env; the folder exists."""
        write_atomically(self.folder / JOB_FILE, (json.dumps(self.as_plain(), indent=1) + "\n").encode())
        save_config(profile, self.folder / PROFILE_FILE)
        write_atomically(self.folder / ENVIRONMENT_FILE, environment_script(self, profile).encode())

    def as_plain(self) -> dict[str, Any]:
        """The job for JSON."""
        paths = {"run_dir": str(self.run_dir), "folder": str(self.folder), "cwd": str(self.cwd)}
        return dataclasses.asdict(self) | paths


def load_job(folder: Path) -> tuple[Job, ClusterProfile]:
    """Read a job's folder.

    Raises:
        UserError: it holds no job, or one of another version.
    """
    path = folder / JOB_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {JOB_FILE}; this is no folder of a submitted job") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from None
    job = build_config(Job, values, origin=str(path))
    return job, load_profile(folder / PROFILE_FILE)


def next_folder(run_dir: Path, name: str) -> Path:
    """Make the folder of the next job of a run: 0001-NAME, 0002-NAME, ...

    Raises:
        OSError: the run's folder cannot be written to.
    """
    slurm_dir = run_dir / SLURM_FOLDER
    slurm_dir.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name.split("-")[0]) for path in slurm_dir.glob("[0-9][0-9][0-9][0-9]-*")]
    folder = slurm_dir / f"{max(numbers, default=0) + 1:04d}-{name}"
    folder.mkdir()
    return folder


def newest_folder(run_dir: Path) -> Path:
    """The folder of the newest job of a run.

    Raises:
        UserError: none was submitted.
    """
    folders = sorted((run_dir / SLURM_FOLDER).glob("[0-9][0-9][0-9][0-9]-*/" + SUBMITTED_FILE))
    if not folders:
        raise UserError(f"{run_dir}: no job was submitted for it (there is no {SLURM_FOLDER}/*/{SUBMITTED_FILE} in it)")
    return folders[-1].parent


def resource_options(job: Job, profile: ClusterProfile) -> list[str]:
    """What sbatch is asked for: partition, nodes, GPUs, time, array, dependencies; nothing of the job's inside."""
    slurm = profile.slurm
    partition = slurm.partition if job.gpus_per_node or not slurm.cpu_partition else slurm.cpu_partition
    named = {
        "job-name": job.name,
        "partition": partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclude": ",".join(slurm.exclude) or None,
        "nodes": job.nodes + job.spare_nodes,
        "cpus-per-task": job.cpus or slurm.cpus_per_node,
        "mem": f"{job.memory_mib}M" if job.memory_mib else slurm.memory_per_node,
        "time": None if job.seconds is None else max(1, -(-job.seconds // 60)),
        "dependency": ",".join(job.after) or None,
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    options.append("--ntasks-per-node=1")
    if job.cpus is None and slurm.cpus_per_node is None:
        options.append("--exclusive")
    if job.gpus_per_node:
        kind = f":{slurm.gpu_type}" if slurm.gpu_type else ""
        options.append(f"--gres=gpu{kind}:{job.gpus_per_node}")
    if job.after:
        options.append("--kill-on-invalid-dep=yes")
    if job.tasks is not None:
        limit = f"%{job.at_once}" if job.at_once else ""
        options.append(f"--array=0-{job.tasks - 1}{limit}")
    return [*options, *slurm.extra]


def environment_script(job: Job, profile: ClusterProfile) -> str:
    """Text of job.env: shell that exports where the job's things are and the profile's variables, and loads modules."""
    own = {
        "MV_JOB": str(job.folder),
        "MV_RUN": str(job.run_dir),
        "MV_CODE": str(job.code),
        "MV_PYTHON": profile.software.python,
        "MV_HOST_PYTHON": profile.software.host_python,
        # The code of the snapshot, whatever lies in the folder that the job runs in.
        "PYTHONPATH": ":".join([str(job.code), *filter(None, [profile.environment.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }
    own = profile.environment | own
    lines = [f"export {name}={shlex.quote(value)}" for name, value in own.items()]
    # On the nodes, so that what they load is of the nodes.
    lines += [f"module load {shlex.quote(module)}" for module in profile.software.modules]
    return "\n".join(lines) + "\n"


def as_plain(profile: ClusterProfile) -> dict[str, Any]:
    """A profile for JSON."""
    return config_to_dict(profile)
