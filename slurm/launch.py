"""How the ranks of a training are started: the srun command, the container around it, and what its tasks source."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_video.files import write_atomically
from slurm.containers import container_words
from slurm.job import Job
from slurm.profile import ClusterProfile
from slurm.scheduler import compress

TASK_ENVIRONMENT, TASK_SCRIPT, NODES_FOLDER = "task.env", "training_task.sh", "nodes"
# srun ends the tasks that are left so long after the first one has ended: as long as torchrun's agents wait for each
# other, as the first rank may have pictures or an evaluation to finish when the others have left.
_WAIT_SECONDS = 300
# Below the ports that Linux hands out by itself.
_FIRST_PORT, _PORTS = 15000, 15000
# Options of the batch job that srun would take for its own, and that mean something else for its tasks.
_NOT_FOR_STEPS = ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_NTASKS_PER_NODE", "SLURM_NO_KILL")


@dataclass(frozen=True)
class Launch:
    """One start of the ranks."""

    name: str
    """<job id>.<restart>.<start>: unique, so it is the id of torchrun's rendezvous too."""
    attempt: Path
    nodes: Sequence[str]
    """The nodes of this start; the first one serves the rendezvous."""
    job_id: str
    start: int
    """Number of the start inside this allocation, from 1."""
    cpus_per_node: int
    end_time: float | None
    """Unix time at which SLURM ends the job."""


def training_options(job: Job, profile: ClusterProfile) -> list[str]:
    """Options of sbatch that the supervisor relies on, for a job whose script is pretrain.sbatch."""
    return [
        f"--signal=B:USR1@{profile.restarts.warning_seconds}",
        "--requeue" if profile.restarts.requeue else "--no-requeue",
        # A lost node then costs a start of the ranks, and not the place in the queue.
        *(["--no-kill"] if job.spare_nodes else []),
    ]


def srun_command(job: Job, profile: ClusterProfile, launch: Launch) -> list[str]:
    """The command that runs all ranks and ends when they have."""
    tasks = profile.ranks_per_node if profile.launch.launcher == "srun" else 1
    crowded = ["--overcommit"] if tasks > launch.cpus_per_node else []
    return [
        "srun",
        f"--job-name={launch.name}",
        f"--nodes={len(launch.nodes)}",
        f"--ntasks={tasks * len(launch.nodes)}",
        f"--ntasks-per-node={tasks}",
        f"--nodelist={compress(launch.nodes)}",
        # Both: without --wait a node that restarts quickly leaves srun waiting for ever.
        "--kill-on-bad-exit=1",
        f"--wait={_WAIT_SECONDS}",
        "--overlap",
        # All CPUs of the job for every task; the ranks bind themselves to those beside their GPU.
        "--cpu-bind=none",
        *crowded,
        f"--output={launch.attempt / NODES_FOLDER}/%N.log",
        *container_words(profile, [job.run_dir, job.cwd], job.cwd, gpus=bool(job.gpus_per_node)),
        "bash",
        str(job.code / "slurm" / TASK_SCRIPT),
        str(launch.attempt),
    ]


def step_environment() -> dict[str, str]:
    """The environment of srun."""
    return {name: value for name, value in os.environ.items() if name not in _NOT_FOR_STEPS}


def write_task_environment(job: Job, profile: ClusterProfile, launch: Launch) -> None:
    """Write what every task of the step sources."""
    variables = {
        **_defaults(job, profile, launch),
        **profile.environment,
        "PYTHONPATH": ":".join(filter(None, [str(job.code), profile.environment.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
        "MV_LAUNCHER": profile.launch.launcher,
        "MV_RANKS_PER_NODE": str(profile.ranks_per_node),
        "MV_FIRST_NODE": launch.nodes[0],
        "MASTER_ADDR": launch.nodes[0],
        "MASTER_PORT": str(port(profile, launch)),
        # torch 2.13 gives restarted ranks the addresses of dead ones otherwise.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if launch.end_time is not None:
        # SLURM 22.05 does not set it; with it a run knows when to save by itself.
        variables["SLURM_JOB_END_TIME"] = str(int(launch.end_time))
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    training = " ".join(shlex.quote(word) for word in _training(job, profile, launch))
    text = "\n".join([*lines, *profile.software.setup, f"training=({training})"]) + "\n"
    write_atomically(launch.attempt / TASK_ENVIRONMENT, text.encode())


def port(profile: ClusterProfile, launch: Launch) -> int:
    """Port of the rendezvous of a start."""
    return port_of_job(profile, launch.job_id, launch.start)


def port_of_job(profile: ClusterProfile, job_id: str, start: int = 0) -> int:
    """Port of this job and start alone, as jobs may share a node and dead ones may hold theirs."""
    return profile.launch.port or _FIRST_PORT + (16 * int(job_id) + start) % _PORTS


def _defaults(job: Job, profile: ClusterProfile, launch: Launch) -> dict[str, str]:
    """What holds unless the profile says otherwise."""
    cpus = max(1, launch.cpus_per_node // profile.ranks_per_node)
    values = {
        # The CPUs of a rank are also those of its loader processes.
        "OMP_NUM_THREADS": str(max(1, min(8, cpus // 2))),
        # Stacks in the log of a rank that a signal ends.
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        # SIGTERM to torchrun: its ranks get so long to save before it kills them (SLURM's own KillWait comes on top).
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(profile.restarts.warning_seconds),
        "HF_HUB_OFFLINE": "1",
    }
    if job.gpus_per_node:
        values |= {
            "NCCL_DEBUG": "WARN",
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": f"{launch.attempt}/nccl_trace_rank_",
        }
    return values


def _training(job: Job, profile: ClusterProfile, launch: Launch) -> list[str]:
    ranks = ["-m", "slurm.rank", str(launch.attempt), *job.command]
    if profile.launch.launcher == "srun":
        return [profile.software.python, *ranks]
    return [
        profile.software.python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(launch.nodes)}",
        f"--nproc-per-node={profile.ranks_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.nodes[0]}:{port(profile, launch)}",
        f"--rdzv-id={launch.name}",
        f"--rdzv-conf=is_host=@IS_HOST@,join_timeout={int(profile.heartbeat.start_seconds)}",
        # Restarts are the supervisor's: it knows of bad nodes and of progress.
        "--max-restarts=0",
        f"--log-dir={launch.attempt}/ranks/@NODE@",
        "--redirects=3",
        "--tee=3",
        *ranks,
    ]
