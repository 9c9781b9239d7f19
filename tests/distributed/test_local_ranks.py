"""The pool of ranks: worlds of any size, what failing ranks tell, and that no rank outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from training.local_ranks import RankError, RankPool

pytestmark = pytest.mark.distributed


def add_ranks() -> tuple[int, int, float]:
    """On a rank: who it is, and the sum of all ranks' numbers."""
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), float(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is out of paper")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def process_id() -> int:
    return os.getpid()


def test_worlds_of_any_size_one_after_another(ranks: RankPool) -> None:
    for size in (1, 8, 3, 2, 2):
        expected = [(rank, size, sum(range(size))) for rank in range(size)]
        assert ranks.run(add_ranks, ranks=size) == expected


def test_processes_stay_between_calls() -> None:
    with RankPool(2, "cpu") as pool:
        assert pool.run(process_id) == pool.run(process_id)


def test_size_of_a_world_is_checked(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="ranks=9 must be from 1 to the pool's size=8"):
        ranks.run(add_ranks, ranks=9)


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail_on, "rank 1 is out of paper"), (die_on, "rank 1: the process died with exit code 3")],
    ids=["raises", "dies"],
)
def test_a_failing_rank_tells_and_the_pool_goes_on(function: object, message: str) -> None:
    with RankPool(3, "cpu") as pool:
        started = time.monotonic()
        with pytest.raises(RankError, match=message):
            pool.run(function, 1, timeout_seconds=600)
        assert time.monotonic() - started < 300  # the others, inside a barrier, were not waited for
        assert pool.run(add_ranks)[2] == (2, 3, 3.0)


def test_a_rank_that_hangs_is_given_up() -> None:
    with RankPool(2, "cpu") as pool:
        pool.run(add_ranks)
        with pytest.raises(RankError, match="rank 1: no answer within 4 s"):
            pool.run(sleep_on, 1, timeout_seconds=4)
        assert pool.run(add_ranks)[0] == (0, 2, 1.0)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_ranks_end_with_their_starter(ending: signal.Signals, tmp_path: Path) -> None:
    """Also when they are inside a collective, and when the starter has no time to end them."""
    script = tmp_path / "starter.py"
    script.write_text(_STARTER)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(psutil.pid_exists, pids))
        run.send_signal(ending)
        deadline = time.monotonic() + 120
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        # Before the starter is waited for: at its own end the ranks end too.
        survivors = [pid for pid in pids if _runs(pid)]
        run.kill()
    assert not survivors


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


_STARTER = """
import os, signal, sys, time
import torch.distributed as dist
from training.local_ranks import RankPool

# A job in the background of a shell inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def pid():
    return os.getpid()

def wait_for_each_other():
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(100)

if __name__ == "__main__":
    with RankPool(2, "cpu") as pool:
        print(*pool.run(pid), flush=True)
        pool.run(wait_for_each_other)
"""
