"""The command line by which a batch process starts a command on the nodes of its job: srun, container, launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from slurm import scheduler
from slurm.containers import container_words, with_setup
from slurm.job import Job
from slurm.launch import port_of_job
from slurm.profile import ClusterProfile

# Below the ports that Linux hands out by itself.


def task_words(job: Job, profile: ClusterProfile, command: Sequence[str], scratch: Path) -> list[str]:
    """Words of a `megatron-video` command, or of Python under torchrun where they begin with -m, as srun takes them.

    Args:
        scratch: folder of the node that a container sees too.
    """
    start = _torchrun(job, profile) if command[0] == "-m" else [profile.software.python, "-m", "megatron_video"]
    folders = [job.run_dir, job.folder, job.cwd, scratch]
    container = container_words(profile, folders, job.cwd, gpus=job.gpus_per_node > 0)
    return [*_srun(job), *container, *with_setup(profile, [*start, *command])]


def _torchrun(job: Job, profile: ClusterProfile) -> list[str]:
    number = os.environ.get("SLURM_JOB_ID", "0")
    name = f"{number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    first = scheduler.expand(os.environ.get("SLURM_JOB_NODELIST", ""))[:1] or ["localhost"]
    ranks = job.options.get("ranks_per_node") or max(1, job.gpus_per_node)
    words = [profile.software.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}"]
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first[0]}:{port_of_job(profile, number)}", f"--rdzv-id={name}"]
    return [*words, f"--nproc-per-node={ranks}", *place, "--max-restarts=0"]


def _srun(job: Job) -> list[str]:
    words = ["srun", f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1"]
    # A rank that is lost must not leave the others waiting for it.
    words += ["--kill-on-bad-exit=1", "--wait=60", "--input=none", "--unbuffered"]
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    # Since 22.05 srun does not take it over from sbatch.
    return [*words, f"--cpus-per-task={cpus}"] if cpus else words
