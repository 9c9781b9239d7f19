"""What is looked at before a job is handed to SLURM. All problems are told at once, each with its way out.

A finding that cannot be decided from here (what only the nodes have, what only a registry knows) is a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm import scheduler
from slurm.job import DONE, NO_RESTART, STOP, Job
from slurm.live_jobs import competitors
from slurm.profile import ClusterProfile
from slurm.scheduler import Node, Partition, SlurmAwayError, SlurmError

TRAININGS = ("pretrain", "curriculum", "vae", "dpo")
"""Kinds whose run is one thing with an end: DONE, NO_RESTART and STOP in its folder speak for it."""

# In memory: gone with the node, and no other node sees it.
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
# On a disk of this machine: other nodes see it only if this machine serves it to them.
_DISK_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "f2fs"}
# By custom each node's own, whatever they are made of.
_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev", "/run", "/local", "/localscratch")
_URI = re.compile(r"^[a-z0-9+]+://|#")
_MIB = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True)
class Plan:
    """A job that is about to be submitted."""

    job: Job
    profile: ClusterProfile
    sbatch: Sequence[str]
    """Options of sbatch, all of them."""
    script: Path
    warned: bool = False
    """Whether it is signalled `restarts.warning_seconds` before its time ends."""
    force: bool = False
    """Start a run in spite of DONE, NO_RESTART or STOP."""
    resuming: bool = False
    """Start a run that was asked to stop."""
    local_run_folder: bool = False
    """Take the user's word that all nodes see the run's folder."""


@dataclass(frozen=True)
class Findings:
    """What the checks found."""

    problems: list[str]
    """Why it must not be submitted."""
    notes: list[str]
    """What could not be decided here."""


class Note(str):
    """A finding that does not stop the submission."""


def check(plan: Plan, left_out: Sequence[str] = ()) -> Findings:
    """All checks but those named in `left_out`.

    Raises:
        SlurmAwayError: SLURM does not answer.
    """
    found = [finding for name, look in CHECKS.items() if name not in left_out for finding in look(plan)]
    problems = [str(finding) for finding in found if not isinstance(finding, Note)]
    notes = [str(finding) for finding in found if isinstance(finding, Note)]
    if not problems and "cluster" not in left_out:
        # SLURM's own opinion sees limits of accounts and QOS; of what is wrong anyway it would only say it again.
        said = _opinion(plan)
        (notes if isinstance(said, Note) else problems).append(str(said))
    return Findings(problems, notes)


def _cluster(plan: Plan) -> Iterator[str]:
    try:
        partition = scheduler.partition(_asked(plan.sbatch, "partition"))
        nodes = [node for node in scheduler.nodes() if partition.name in node.partitions]
        left_out = {name for group in plan.profile.slurm.exclude for name in scheduler.expand(group)}
    except SlurmAwayError:
        # Nothing else can be asked either.
        raise
    except SlurmError as error:
        yield f"slurm: {error}"
        return
    if partition.state != "UP":
        yield f"partition {partition.name}: it is {partition.state}, not UP; choose another (slurm.partition)"
    yield from _time(plan, partition)
    yield from _nodes(plan, partition, [node for node in nodes if node.name not in left_out])


def _time(plan: Plan, partition: Partition) -> Iterator[str]:
    seconds, warning = plan.job.seconds, plan.profile.restarts.warning_seconds
    if seconds is not None and partition.max_seconds is not None and seconds > partition.max_seconds:
        yield (
            f"--time {show_time(seconds)}: partition {partition.name} allows {show_time(partition.max_seconds)}; "
            "ask for less, the run continues in the next job (restarts.requeue, or --chain)"
        )
    if plan.warned and seconds is not None and warning >= seconds:
        yield (
            f"restarts.warning_seconds={warning}: not less than the wall time of {seconds} s; the run would be told to "
            "leave at its start. Ask for more --time, or --set restarts.warning_seconds=..."
        )


def _nodes(plan: Plan, partition: Partition, nodes: Sequence[Node]) -> Iterator[str]:
    job, slurm = plan.job, plan.profile.slurm
    wanted = job.nodes + job.spare_nodes
    asked = f"--nodes {job.nodes}" + (f" --spares {job.spare_nodes}" if job.spare_nodes else "")
    if wanted > partition.total_nodes:
        yield f"{asked}: partition {partition.name} has {partition.total_nodes} nodes"
    if partition.max_nodes is not None and wanted > partition.max_nodes:
        yield f"{asked}: partition {partition.name} allows {partition.max_nodes} nodes a job"
    able = [node for node in nodes if node.gpus >= job.gpus_per_node]
    most = max((node.gpus for node in nodes), default=0)
    if not able:
        yield (
            f"slurm.gpus_per_node={job.gpus_per_node}: the nodes of partition {partition.name} have at most {most} "
            "GPUs; mend the profile, or choose another partition"
        )
    elif len(able) < wanted <= partition.total_nodes:
        left = f", slurm.exclude={','.join(slurm.exclude)} left out" if slurm.exclude else ""
        yield f"{asked}: {len(able)} nodes of partition {partition.name} have {job.gpus_per_node} GPUs{left}"
    kinds = sorted({node.gres for node in nodes if node.gpus})
    if job.gpus_per_node and slurm.gpu_type and not any(f"gpu:{slurm.gpu_type}" in kind for kind in kinds):
        yield f"slurm.gpu_type={slurm.gpu_type}: the nodes of partition {partition.name} have {', '.join(kinds)}"
    yield from _sizes(plan, nodes)
    up = [node for node in able if not re.search("DOWN|DRAIN|FAIL|MAINT|NOT_RESPONDING|[*]", node.state)]
    if len(up) < wanted <= len(able):
        yield Note(f"{len(up)} of {len(able)} nodes that could run it are up; it waits for {wanted}")


def _sizes(plan: Plan, nodes: Sequence[Node]) -> Iterator[str]:
    slurm = plan.profile.slurm
    cpus = max((node.cpus for node in nodes), default=0)
    if slurm.cpus_per_node is not None and slurm.cpus_per_node > cpus:
        yield f"slurm.cpus_per_node={slurm.cpus_per_node}: the largest node has {cpus}"
    size = re.fullmatch(r"(\d+)([KMGT]?)B?", slurm.memory_per_node.upper())
    memory = max((node.memory_mib for node in nodes), default=0)
    if size is None:
        yield f"slurm.memory_per_node={slurm.memory_per_node}: write a number of MiB, or 200G; 0 is all of a node's"
    elif int(size[1]) * _MIB[size[2]] > memory:
        yield f"slurm.memory_per_node={slurm.memory_per_node}: the largest node has {memory} MiB"


def _opinion(plan: Plan) -> str:
    try:
        said = scheduler.would_start(plan.sbatch, str(plan.script), [str(plan.job.folder)])
    except SlurmError as error:
        return f"sbatch --test-only: {error.said}"
    return Note(said.replace("sbatch: ", "sbatch --test-only: ", 1))


def _software(plan: Plan) -> Iterator[str]:
    software = plan.profile.software
    if software.image is not None and _URI.search(software.image):
        yield Note(f"software.image={software.image}: an address; whether it is there is not checked")
    elif software.image is not None and not os.access(software.image, os.R_OK):
        yield f"software.image={software.image}: {_absence(Path(software.image))}; slurm/container makes one"
    for mount in software.mounts:
        source = Path(mount.split(":")[0])
        if not os.path.exists(source):
            yield f"software.mounts={mount}: {source} does not exist"
    if software.modules:
        yield Note(f"software.modules={', '.join(software.modules)}: only the nodes can tell whether they are there")
    outside = [("host_python", software.host_python)]
    # Inside a container nobody can look from here.
    outside += [("python", software.python)] if software.container == "none" and not software.modules else []
    for name, python in outside:
        if "/" in python and not os.access(python, os.X_OK):
            yield f"software.{name}={python}: no program; name a Python 3.11 that every node sees"
    missing = [name for name in plan.profile.pass_environment if name not in os.environ]
    if missing:
        yield f"pass_environment: {', '.join(missing)} is not set here; export it, or take it out of the profile"


def _folder(plan: Plan) -> Iterator[str]:
    run_dir = plan.job.run_dir
    # Not Path.exists, which raises where a folder on the way cannot be searched.
    existing = next(path for path in (run_dir, *run_dir.parents) if os.path.exists(path))
    what = f"run folder {run_dir}"
    if not existing.is_dir():
        yield f"{what}: {existing} is no folder; name another"
        return
    if os.statvfs(existing).f_flag & os.ST_RDONLY or not os.access(existing, os.W_OK | os.X_OK):
        yield f"{what}: {existing} cannot be written by {_user()}; name another"
    shared = any(run_dir.is_relative_to(folder) for folder in plan.profile.shared_folders)
    if shared or plan.local_run_folder:
        return
    kind = file_system(existing)
    by_custom = next((folder for folder in _LOCAL_FOLDERS if run_dir.is_relative_to(folder)), None)
    way_out = (
        "name one on the shared file system; if all nodes do see it, say so with shared_folders in the profile, or "
        "once with --local-run-folder"
    )
    if kind in _MEMORY_FILE_SYSTEMS:
        yield f"{what}: on {kind}, in the memory of this machine; {way_out}"
    elif by_custom:
        yield f"{what}: {by_custom} is each node's own; {way_out}"
    elif kind in _DISK_FILE_SYSTEMS:
        yield Note(f"{what}: on {kind}, a disk of this machine; all nodes must see it under this path")


def _verdicts(plan: Plan) -> Iterator[str]:
    job = plan.job
    if job.kind not in TRAININGS or plan.force:
        return
    for name, meaning, way_out in (
        (DONE, "is finished", "if it is to go on, as with more steps, give --force"),
        (NO_RESTART, "must not be started again", "when the cause is mended: megatron-video slurm resume RUN --force"),
        (STOP, "was asked to stop", "megatron-video slurm resume RUN starts it again"),
    ):
        if (job.slurm_dir / name).exists() and not (plan.resuming and name == STOP):
            reason = (job.slurm_dir / name).read_text(encoding="utf-8", errors="replace").strip()
            why = f" ({reason})" if reason else ""
            yield f"run {job.run_dir}: it {meaning}{why}, says {job.slurm_dir / name}; {way_out}"


def _live(plan: Plan) -> Iterator[str]:
    try:
        yield from competitors(plan.job)
    except SlurmError as error:
        yield f"slurm: {error}"


def _after(plan: Plan) -> Iterator[str]:
    for dependency in plan.job.after:
        for number in re.findall(r":(\d+)", dependency):
            try:
                scheduler.job_records(number)
            except SlurmError as error:
                yield f"--after {dependency}: SLURM knows no job {number} (any more): {error}"


# By the names that --no-check takes.
CHECKS: dict[str, Callable[[Plan], Iterator[str]]] = {
    "cluster": _cluster,
    "software": _software,
    "folder": _folder,
    "verdicts": _verdicts,
    "live": _live,
    "after": _after,
}


def file_system(path: Path) -> str:
    """Type of the file system that holds a path: ext4, nfs4, lustre, tmpfs, ..., as Linux names it."""
    best, kind = "", "unknown"
    real = str(path.resolve())
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        # Blanks in it are written as \040.
        mount = before.split()[4].encode().decode("unicode_escape")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        # Of two on one folder the later one hides the other.
        if inside and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


def show_time(seconds: int) -> str:
    """Seconds as SLURM writes them: [days-]hours:minutes:seconds."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _asked(sbatch: Sequence[str], name: str) -> str | None:
    # The last one counts, as in sbatch: slurm.extra may name another.
    values = [option.split("=", 1)[1] for option in sbatch if option.startswith(f"--{name}=")]
    return values[-1] if values else None


def _absence(path: Path) -> str:
    return "cannot be read" if os.path.exists(path) else "does not exist"


def _user() -> str:
    return f"user {os.geteuid()}"
