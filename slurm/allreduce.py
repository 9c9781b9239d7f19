"""Bus bandwidth of an all-reduce, for preflight: `python -m slurm.allreduce REQUEST`, one task a node of the group.

Every task starts a process for each of its ranks. Over NCCL where there are GPUs (not run), else gloo.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore

from megatron_video.files import write_atomically
from slurm.preflight_requests import AllReduceRequest, read_request

MIB = 1 << 20
WARM_UP, REPEATS = 2, 5
_RANK = "MV_ALLREDUCE_RANK"


def main(argv: Sequence[str]) -> int:
    """Start this node's ranks and wait for them, or be one of them."""
    request = read_request(AllReduceRequest, Path(argv[0]))
    if _RANK in os.environ:
        run_rank(request, int(os.environ[_RANK]))
        return 0
    node = request.nodes.index(os.environ["SLURMD_NODENAME"])
    first = node * request.ranks_per_node
    command = [sys.executable, "-m", "slurm.allreduce", *argv]
    ranks = range(first, first + request.ranks_per_node)
    processes = [subprocess.Popen(command, env={**os.environ, _RANK: str(rank)}) for rank in ranks]
    return max(abs(process.wait()) for process in processes)


def run_rank(request: AllReduceRequest, rank: int) -> None:
    """One rank's part; the first writes the result."""
    world = len(request.nodes) * request.ranks_per_node
    limit = timedelta(seconds=request.seconds)
    device = torch.device("cuda", rank % request.ranks_per_node) if request.gpus else torch.device("cpu")
    if request.gpus:
        torch.cuda.set_device(device)
    store = join(request, rank, world)
    backend = "nccl" if request.gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    tensor = torch.empty(request.mib * MIB // 4, device=device)
    seconds = [timed_all_reduce(tensor, rank, world) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    if rank == 0:
        # As nccl-tests counts it: 2 (n - 1) / n of the bytes pass through every rank.
        gb_s = 2 * (world - 1) / world * tensor.numel() * 4 / median(seconds) / 1e9
        write_atomically(request.result, json.dumps({"gb_s": gb_s, "ranks": world}).encode())
    dist.destroy_process_group()


def timed_all_reduce(tensor: torch.Tensor, rank: int, world: int) -> float:
    """Seconds of one all-reduce on the slowest rank.

    Raises:
        RuntimeError: the sum is wrong.
    """
    tensor.fill_(rank + 1)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    # Brings the work of the device to its end.
    wrong = int((tensor != world * (world + 1) / 2).sum())
    spent = torch.tensor([time.perf_counter() - start], device=tensor.device)
    if wrong:
        raise RuntimeError(f"{socket.gethostname()}: {wrong} elements of a sum over {world} ranks are wrong")
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def join(request: AllReduceRequest, rank: int, world: int) -> Store:
    """The group's store, on the first node at a port that is free there.

    Raises:
        TimeoutError: the first rank's address did not appear.
    """
    limit = timedelta(seconds=request.seconds)
    if rank == 0:
        store = TCPStore("0.0.0.0", 0, world, is_master=True, timeout=limit, wait_for_workers=False)
        write_atomically(request.rendezvous, f"{socket.gethostname()} {store.port}".encode())
        return store
    deadline = time.monotonic() + request.seconds
    while not request.rendezvous.is_file():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{request.nodes[0]} did not tell its address within {request.seconds:g} s")
        time.sleep(0.1)
    host, port = request.rendezvous.read_text().split()
    return TCPStore(host, int(port), world, is_master=False, timeout=limit, wait_for_workers=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
