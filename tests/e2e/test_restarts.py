"""Ranks and nodes that are lost while a job runs: it is restarted and gives the curve of a job that nothing befell."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from fault_runs import command, environment, losses, run
from tiny_shards import write_tiny_shards

from training.events import read_events

pytestmark = pytest.mark.distributed

STEPS = 30
LENGTH = [f"training.steps={STEPS}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("restarts")
    write_tiny_shards(root / "shards")
    return root


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[int, float]:
    # One process: what any number of ranks must give.
    result = run(folder, "undisturbed", *LENGTH, faults=[], ranks=1)
    assert result.returncode == 0, result.stdout
    return losses(folder / "undisturbed")


def test_four_ranks_of_which_one_is_killed_at_a_random_step(folder: Path, undisturbed: dict[int, float]) -> None:
    draw = random.Random(os.getpid())
    # Late enough that the first checkpoint, which is written while training goes on, is certainly complete.
    killed = {"kind": "send", "rank": draw.randrange(4), "step": draw.randrange(16, STEPS - 2), "signal": "SIGKILL"}
    launch = ("--standalone", "--nproc-per-node", "4", "--max-restarts", "2")
    result = run(folder, "killed", *LENGTH, faults=[killed], launch=launch)
    assert result.returncode == 0, result.stdout
    assert "exitcode: -9" in result.stdout
    (resume,) = read_events(folder / "killed", "resume")
    # The loader was two steps ahead; the newest complete checkpoint is at most two saves older.
    assert killed["step"] - 14 <= resume["step"] < killed["step"]
    assert losses(folder / "killed") == pytest.approx(undisturbed, rel=1e-6)


def start_agent(folder: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """One node of an elastic job that runs with one or two of them."""
    launch = (
        "--nnodes=1:2",
        "--nproc-per-node=2",
        "--max-restarts=3",
        "--monitor-interval=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=lost",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-conf=last_call_timeout=5",
    )
    slow = [{"kind": "sleep", "rank": 0, "step": 0, "last": 1000, "seconds": 0.3}]
    return subprocess.Popen(
        command(folder, "elastic", *LENGTH, launch=launch),
        env=environment(folder / "elastic", slow) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


@pytest.mark.heavy
def test_a_lost_node_leaves_a_job_that_goes_on_with_half_the_ranks(
    folder: Path, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / "stays.log", tmp_path / "lost.log"]
    # The first agent serves the rendezvous, so the second is the one that can be lost.
    stays = start_agent(folder, port, logs[0])
    time.sleep(1)
    lost = start_agent(folder, port, logs[1])
    try:
        deadline = time.monotonic() + 200
        while not any(event["step"] >= 10 for event in read_events(folder / "elastic", "save")):
            assert stays.poll() is None, logs[0].read_text()
            assert time.monotonic() < deadline, logs[0].read_text()
            time.sleep(0.1)
        # The node is gone all at once.
        for process in [*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)]:
            process.kill()
        assert stays.wait(timeout=200) == 0, logs[0].read_text()
    finally:
        for agent in (stays, lost):
            agent.kill()
            agent.wait()
    worlds = [event["world_size"] for event in read_events(folder / "elastic", "start", "resume")]
    assert (worlds[0], worlds[-1]) == (4, 2)
    assert losses(folder / "elastic") == pytest.approx(undisturbed, rel=1e-5)
