"""What preflight asks of the nodes: one JSON file a step, on the shared file system, in the folder of its answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron_video.files import write_atomically

T = TypeVar("T", "HostRequest", "BurnRequest", "AllReduceRequest")
REQUEST_FILE, TOKEN_FILE = "request.json", "token"


@dataclass(frozen=True)
class HostRequest:
    """What a node measures of itself; see slurm.preflight_probes."""

    folder: str
    """Where the answers go."""
    token: str
    """Content of a file that the batch host has just written there."""
    local_folder: str
    local_probe_mib: int
    """Size of the file that is written and read there; 0: none."""
    shared_probe_mib: int
    visible_seconds: float
    """How long to wait for the token."""
    xids: list[int]
    """Codes of the driver's errors to look for."""


@dataclass(frozen=True)
class BurnRequest:
    """Matrix products on every device of a node; see slurm.burn."""

    folder: str
    """Where the answers go."""
    gpus: int
    """GPUs of the node; 0: its CPUs."""
    seconds: float
    size: int
    """Rows and columns of the factors."""


@dataclass(frozen=True)
class AllReduceRequest:
    """An all-reduce over a group of nodes; see slurm.allreduce."""

    folder: str
    """Rendezvous and result go there."""
    nodes: list[str]
    """Of the group, in the order of their ranks."""
    ranks_per_node: int
    gpus: int
    """GPUs of a node; 0: gloo between CPUs."""
    mib: int
    """Size of the tensor on each rank."""
    seconds: float
    """Limit of every single step: joining, an all-reduce."""

    @property
    def result(self) -> Path:
        """Where the first rank writes what was measured."""
        return Path(self.folder) / "result.json"

    @property
    def rendezvous(self) -> Path:
        """Where the first rank tells its address."""
        return Path(self.folder) / "rendezvous"


def write_request(request: HostRequest | BurnRequest | AllReduceRequest) -> Path:
    """Write a request, and the token that belongs to it, into its folder."""
    folder = Path(request.folder)
    if isinstance(request, HostRequest):
        write_atomically(folder / TOKEN_FILE, request.token.encode())
    write_atomically(folder / REQUEST_FILE, json.dumps(asdict(request)).encode())
    return folder / REQUEST_FILE


def read_request(cls: type[T], path: Path) -> T:
    """The request in a file."""
    return cls(**json.loads(path.read_text(encoding="utf-8")))
