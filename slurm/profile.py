"""A cluster's profile: what its users would otherwise type into every batch script, once, as a YAML file.

Read by `megatron-video slurm submit`; the resolved profile is kept with every submission.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

from megatron_video.config_io import config_dataclass, load_config

PROFILE_DIR = Path(__file__).parent / "profiles"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Limits of Preflight that are numbers.
_FLOORS = (
    "max_remapped_rows",
    "nvlinks",
    "fabric_ports",
    "min_free_memory_gib",
    "min_local_free_gib",
    "min_local_write",
    "min_local_read",
    "min_shared_free_gib",
    "min_shared_write",
    "min_shared_read",
    "max_visible_seconds",
    "max_skew_seconds",
    "min_gemm_tflops",
    "max_gemm_errors",
    "min_allreduce_gb_s",
)


@config_dataclass
class SlurmOptions:
    """What sbatch is told."""

    partition: str | None = None
    """Partition of jobs that need GPUs (or, where gpus_per_node is 0, of all); null: the cluster's default."""
    cpu_partition: str | None = None
    """Partition of jobs that need none, such as segmenting; null: the same."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, as --constraint takes them."""
    reservation: str | None = None
    """Reservation to run in."""
    exclude: list[str] = field(default_factory=list)
    """Nodes never to use; host lists such as `node[3,7-9]` are allowed."""
    gpus_per_node: int = 8
    """GPUs of a node; 0: a cluster of CPUs."""
    gpu_type: str | None = None
    """Type in --gres=gpu:TYPE:N, where the cluster wants it named."""
    cpus_per_node: int | None = None
    """CPUs a node of a job gets; null: the whole node (--exclusive)."""
    memory_per_node: str = "0"
    """--mem; 0 is all of a node's."""
    extra: list[str] = field(default_factory=list)
    """Further sbatch options, each as one word: `--switches=1@12:00:00`."""

    def __post_init__(self) -> None:
        """Refuse what sbatch could not take.

        Raises:
            ValueError: naming the field and the value.
        """
        if self.gpus_per_node < 0:
            raise ValueError(f"gpus_per_node={self.gpus_per_node} must not be negative")
        if self.cpus_per_node is not None and self.cpus_per_node < 1:
            raise ValueError(f"cpus_per_node={self.cpus_per_node} must be at least 1, or null for whole nodes")
        for option in self.extra:
            if not option.startswith("--"):
                raise ValueError(f"extra holds {option!r}; write every option as one word, such as --switches=1")


@config_dataclass
class Software:
    """Where the job's programs come from: a container, environment modules, or what is installed."""

    container: Literal["none", "pyxis", "apptainer"] = "none"
    """How tasks enter the container: pyxis (enroot) through srun's own options, apptainer by `apptainer exec --nv`."""
    image: str | None = None
    """Path of a .sqsh or .sif file, or a URI (docker://, or registry#name as enroot writes it)."""
    mounts: list[str] = field(default_factory=list)
    """SOURCE:TARGET[:FLAGS] a container sees besides the run's folder and the code."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load on every node."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that every task runs first, such as `source /shared/venv/bin/activate`."""
    python: str = sys.executable
    """Python of the tasks (inside the container, if there is one)."""
    host_python: str = sys.executable
    """Python 3.11 with this package outside the container, on every node: supervises the job and checks the nodes."""

    def __post_init__(self) -> None:
        """Refuse a container without an image, and the reverse.

        Raises:
            ValueError: naming the field and the value.
        """
        if self.container == "none" and self.image is not None:
            raise ValueError(f"image={self.image} needs container: pyxis or apptainer")
        if self.container != "none" and self.image is None:
            raise ValueError(f"container={self.container} needs image")
        for mount in self.mounts:
            if not 2 <= len(mount.split(":")) <= 3 or not mount.startswith("/"):
                raise ValueError(f"mounts holds {mount!r}; write /SOURCE:/TARGET or /SOURCE:/TARGET:FLAGS")


@config_dataclass
class Launch:
    """How the ranks of a training are started."""

    launcher: Literal["torchrun", "srun"] = "torchrun"
    """torchrun: one task a node, which starts a process a GPU; srun: one task a rank."""
    processes_per_node: int | None = None
    """Ranks of a node; null: one a GPU (a cluster of CPUs: 1)."""
    port: int | None = None
    """Port of the rendezvous on the first node; null: derived from the job's number."""


@config_dataclass
class Restarts:
    """When a job that ended is started again, and when no more."""

    warning_seconds: int = 300
    """SIGUSR1 comes so long before the wall time ends: the run saves and leaves. Slower than the slowest save."""
    requeue: bool = True
    """Put the job back into the queue itself (sites that forbid it: chain jobs with `--chain N`)."""
    attempts_without_progress: int = 3
    """Starts in a row that may end without a newer complete checkpoint; then nothing starts the run again."""
    in_job_restarts: int = 10
    """Starts inside one allocation, on its spare nodes, before it is given back and requeued."""
    exclude_hours: float = 24.0
    """How long a node that failed is left out of this run's later starts."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("warning_seconds", "attempts_without_progress"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("in_job_restarts", "exclude_hours"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@config_dataclass
class Heartbeat:
    """How long a job may be silent before its step is ended from outside (the trainer's own watchdog comes first)."""

    start_seconds: float = 3600.0
    """From the start of the ranks to the first step."""
    step_seconds: float = 1800.0
    """Between two signs of life, saves and validation included."""


@config_dataclass
class Preflight:
    """What a node must reach before a job starts on it; null (or false) leaves a check out."""

    enabled: bool = True
    """Check all nodes before every start."""
    action: Literal["exclude", "drain"] = "exclude"
    """A bad node: left out of this run, or drained for everyone too (needs the rights of an operator)."""
    scores: str | None = None
    """Folder of the whole cluster's measurements, one file a node, writable by its users; null: only below each run."""
    seconds: float = 120.0
    """Limit of the checks of a node; one that has not answered by then is bad."""
    burn_seconds: float = 300.0
    """The same for products and all-reduces, which start Python in the container."""
    gpus: bool = True
    """Every node shows as many GPUs as a job takes of it."""
    ecc: bool = True
    """No uncorrected memory error since the last reset, no remapped row that waits for a reset or could not be had."""
    max_remapped_rows: int | None = 8
    """Rows of a GPU's memory replaced after uncorrectable errors."""
    xids: list[int] | None = field(
        default_factory=lambda: [48, 62, 64, 74, 79, 94, 95, 110, 119, 120, 136, 140, 143, 155]
    )
    """Errors of the driver in the kernel's log since the boot that speak against a node."""
    min_driver: str | None = None
    """Oldest driver; all nodes must have the same in any case."""
    throttling: bool = True
    """No GPU is slowed down by heat or its power supply."""
    nvlinks: int | None = None
    """Links that are up on every GPU."""
    leftovers: bool = True
    """No process of an earlier job is left on a GPU."""
    fabric_ports: int | None = None
    """Ports of InfiniBand or RoCE that are up, at least."""
    same_versions: bool = True
    """Driver, kernel, Python, torch and the other packages are the same everywhere: as on most of the nodes."""
    min_free_memory_gib: float | None = 16.0
    """Memory of the host."""
    local_folder: str = "/tmp"
    """Node-local disk: caches of compiled kernels, temporary files."""
    min_local_free_gib: float | None = 10.0
    """Free there."""
    min_local_write: float | None = 100.0
    """MB/s, with the disk's confirmation."""
    min_local_read: float | None = 100.0
    """MB/s."""
    local_probe_mib: int = 256
    """Size of the file that is written and read there."""
    min_shared_free_gib: float | None = 10.0
    """Free where the run's folder is, seen from the node."""
    min_shared_write: float | None = 20.0
    """MB/s of one node into the run's folder while all nodes write."""
    min_shared_read: float | None = 20.0
    """MB/s; what a node has just written may come from its own memory."""
    shared_probe_mib: int = 64
    """Size of each node's file there."""
    max_visible_seconds: float | None = 10.0
    """A file that the batch host writes is seen by the nodes within."""
    max_skew_seconds: float | None = 2.0
    """Clock of a node against the batch host's."""
    min_gemm_tflops: float | None = None
    """Each GPU's (a cluster of CPUs: the node's) rate of matrix products over gemm_seconds, all GPUs at once."""
    max_gemm_errors: int | None = 0
    """Products whose elements differ from the exact ones, or from those that the same device gave before."""
    gemm_seconds: float = 10.0
    """Length of the burn."""
    gemm_size: int | None = None
    """Rows and columns of the factors; null: 8192 in bf16 on GPUs, 1024 in fp32 on CPUs."""
    min_allreduce_gb_s: float | None = None
    """Bus bandwidth of an all-reduce over all ranks of the job, in GB/s as nccl-tests counts it."""
    allreduce_mib: int = 1024
    """Size of the tensor on each rank."""

    def __post_init__(self) -> None:
        """Refuse limits that no node could be held to.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("seconds", "burn_seconds", "local_probe_mib", "shared_probe_mib", "gemm_size", "allreduce_mib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in (*_FLOORS, "gemm_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative; null leaves the check out")


@config_dataclass
class ClusterProfile:
    """Everything that submitting needs to know of a cluster."""

    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    """Options of sbatch."""
    software: Software = field(default_factory=Software)
    """Container, modules, Python."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every task: NCCL and fabric (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ...), caches. No secrets."""
    pass_environment: list[str] = field(default_factory=list)
    """Names of variables that are taken over from whoever submits, such as a token; their values are never written."""
    launch: Launch = field(default_factory=Launch)
    """Start of the ranks."""
    restarts: Restarts = field(default_factory=Restarts)
    """Requeueing."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Hang detection."""
    preflight: Preflight = field(default_factory=Preflight)
    """Checks of nodes."""
    shared_folders: list[str] = field(default_factory=list)
    """Folders that all nodes see although they look local (/tmp, a disk of the login node that it serves)."""
    planner_cluster: str | None = None
    """Name or file of the planner's cluster (training/configs/clusters), for the dry run before submission."""

    def __post_init__(self) -> None:
        """Refuse names that are no environment variables.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in (*self.environment, *self.pass_environment):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} in environment or pass_environment is not the name of a variable")

    @property
    def ranks_per_node(self) -> int:
        """Processes of a training on every node."""
        return self.launch.processes_per_node or max(1, self.slurm.gpus_per_node)


def load_profile(source: str | Path, overrides: Sequence[str] = ()) -> ClusterProfile:
    """Read a profile: a YAML file, or the name of one in slurm/profiles; `group.field=value` override fields.

    Raises:
        UserError: no such file, not YAML, an unknown field, a wrong type, or a contradiction.
    """
    return load_config(ClusterProfile, source, overrides, PROFILE_DIR)
