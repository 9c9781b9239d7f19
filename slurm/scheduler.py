"""Asking SLURM, and telling it: sbatch, squeue, scontrol, sinfo, scancel. A controller that is away is asked again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_video.errors import UserError

# What the client programs print when the controller does not answer: it may come back.
_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|Transport endpoint|"
    r"Zero Bytes were transmitted|Communication connection failure|controller.*(not respond|connect failure)",
    re.IGNORECASE,
)
# Number, name, state, reason, nodes, user, time left; none of them holds this separator.
_QUEUE_FORMAT = "%i\x1f%j\x1f%T\x1f%r\x1f%N\x1f%u\x1f%L"
_UNLIMITED = re.compile(r"UNLIMITED|INFINITE|NOT_SET", re.IGNORECASE)


class SlurmError(UserError):
    """A program of SLURM refused; the message holds what it was given and what it said.

    Args:
        said: only what it said.
    """

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(message)
        self.said = said or message


class SlurmAwayError(SlurmError):
    """The controller did not answer in the given time."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that is in the queue: waiting, running or ending. Tasks of an array are one each."""

    job_id: str
    """As squeue names it; a task of an array is `17_3`, several waiting ones `17_[3-9]`."""
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, REQUEUED, ..."""
    reason: str
    """Why it waits, or how it ended."""
    nodes: str
    """Host list, empty before the start."""
    user: str
    seconds_left: int | None
    """Until the wall time ends; None without a limit or before the start."""


@dataclass(frozen=True)
class Partition:
    """What a partition allows."""

    name: str
    state: str
    max_seconds: int | None
    """Longest wall time; None: no limit."""
    max_nodes: int | None
    """Most nodes of one job; None: no limit."""
    total_nodes: int
    fields: dict[str, str]
    """Everything scontrol says."""


@dataclass(frozen=True)
class Node:
    """What a node has."""

    name: str
    state: str
    """As scontrol has it: IDLE, MIXED+DRAIN, DOWN*, ..."""
    cpus: int
    memory_mib: int
    gpus: int
    gres: str
    """As it is configured: gpu:h100:8."""
    reason: str
    """Why it is drained or down."""
    partitions: tuple[str, ...]


def ask(*command: str, patience: float = 60.0, timeout: float = 30.0) -> str:
    """Output of one of SLURM's programs; while the controller is away, asked again for `patience` seconds.

    Raises:
        SlurmAwayError: the controller did not come back.
        SlurmError: SLURM is not installed, or refused.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]}: not found; run this on a login node of the cluster, where SLURM is installed")
    deadline = time.monotonic() + patience
    while True:
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            said, code = (result.stderr or result.stdout).strip(), result.returncode
        except subprocess.TimeoutExpired:
            said, code = f"Socket timed out: no answer within {timeout:g} s", 1
        if code == 0:
            return result.stdout
        away = bool(_AWAY.search(said))
        if not away:
            raise SlurmError(f"{' '.join(command)}: {said}", said)
        if time.monotonic() >= deadline:
            raise SlurmAwayError(f"{' '.join(command)}: {said}; the controller was asked for {patience:g} s")
        time.sleep(min(2.0, patience / 10))


def submit(options: Sequence[str], script: str, arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; the job's number.

    Raises:
        SlurmError: sbatch refused.
    """
    return ask(*_sbatch(), "--parsable", *options, script, *arguments).strip().split(";")[0]


def would_start(options: Sequence[str], script: str, arguments: Sequence[str] = ()) -> str:
    """What SLURM says to a batch script that is not submitted: when and where it could start.

    Raises:
        SlurmError: it would be refused.
    """
    # sbatch says it on its standard error.
    return ask("sh", "-c", 'exec "$@" 2>&1', "sh", *_sbatch(), "--test-only", *options, script, *arguments).strip()


def _sbatch() -> list[str]:
    # A job may submit another: its own variables must not become options of that one.
    before = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
    return [*(["env", *(word for name in before for word in ("-u", name))] if before else []), "sbatch"]


def queued(*selection: str, patience: float = 60.0) -> list[QueuedJob]:
    """Jobs in the queue; `selection`: options of squeue, such as --jobs=17,18 or --name=NAME.

    A number that the queue does not know any more gives no job.

    Raises:
        SlurmError: squeue refused, or the controller is away.
    """
    try:
        text = ask("squeue", "--noheader", f"--format={_QUEUE_FORMAT}", *selection, patience=patience)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [_queued(line) for line in text.splitlines() if line.strip()]


def job_records(job_id: str, patience: float = 60.0) -> list[dict[str, str]]:
    """What `scontrol show job` has on a job, also for a while after its end; a record a task of an array.

    Raises:
        SlurmError: no such job (any more), or the controller is away.
    """
    text = ask("scontrol", "--oneliner", "show", "job", job_id, patience=patience)
    return [parse_record(line) for line in text.splitlines() if line]


def partition(name: str | None) -> Partition:
    """A partition, or the default one.

    Raises:
        SlurmError: there is none of this name.
    """
    records = [parse_record(line) for line in ask("scontrol", "--oneliner", "show", "partition").splitlines() if line]
    names = [record["PartitionName"] for record in records]
    chosen = [
        record for record in records if (record["PartitionName"] == name if name else record.get("Default") == "YES")
    ]
    if not chosen:
        what = f"partition {name!r}: there is none" if name else "the cluster has no default partition; name one"
        raise SlurmError(f"{what}; partitions: {', '.join(names)}")
    record = chosen[0]
    most = record.get("MaxNodes", "UNLIMITED")
    return Partition(
        name=record["PartitionName"],
        state=record.get("State", ""),
        max_seconds=parse_time(record.get("MaxTime", "")),
        max_nodes=None if _UNLIMITED.search(most) else int(most),
        total_nodes=int(record.get("TotalNodes", 0)),
        fields=record,
    )


def nodes(selection: str | None = None, patience: float = 60.0) -> list[Node]:
    """All nodes, or those of a host list.

    Raises:
        SlurmError: no such node, or the controller is away.
    """
    text = ask("scontrol", "--oneliner", "show", "node", *([selection] if selection else []), patience=patience)
    return [_node(parse_record(line)) for line in text.splitlines() if line]


def expand(host_list: str) -> list[str]:
    """Names in a host list: node[1-3] -> node1, node2, node3.

    Raises:
        SlurmError: not a host list.
    """
    return ask("scontrol", "show", "hostnames", host_list).split() if host_list else []


def compress(names: Sequence[str]) -> str:
    """The host list of some names."""
    return ask("scontrol", "show", "hostlistsorted", ",".join(names)).strip() if names else ""


def parse_record(line: str) -> dict[str, str]:
    """`Key=Value Key=Value with blanks ...`, as `scontrol --oneliner show` prints it."""
    parts = re.split(r"(?:^|\s)([A-Za-z][A-Za-z0-9/:_]*)=", line)
    return {key: value.strip() for key, value in zip(parts[1::2], parts[2::2], strict=True)}


def parse_time(text: str) -> int | None:
    """Seconds of SLURM's [days-]hours:minutes:seconds and its shorter forms; None for no limit.

    Raises:
        ValueError: no such form.
    """
    if not text or _UNLIMITED.search(text) or text in ("INVALID", "N/A"):
        return None
    days, dash, clock = text.rpartition("-")
    numbers = [int(part) for part in clock.split(":")]
    if len(numbers) > 3:
        raise ValueError(f"{text!r} is not a time as SLURM writes it, such as 1-12:00:00")
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _queued(line: str) -> QueuedJob:
    job_id, name, state, reason, where, user, left = (part.strip() for part in line.split("\x1f"))
    return QueuedJob(job_id, name, state, reason, where, user, parse_time(left))


def _node(record: dict[str, str]) -> Node:
    gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", record.get("Gres", "")))
    return Node(
        name=record["NodeName"],
        state=record.get("State", ""),
        cpus=int(record.get("CPUTot", 0)),
        memory_mib=int(record.get("RealMemory", 0)),
        gpus=gpus,
        gres=record.get("Gres", ""),
        reason=record.get("Reason", ""),
        partitions=tuple(record.get("Partitions", "").split(",")),
    )
