"""The rank monitor of nvidia-resiliency-ext, where it is installed: it ends a hung job and its launcher restarts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fault_runs import command, environment, losses
from tiny_shards import write_tiny_shards

from megatron_video.errors import UserError
from training.events import read_events
from training.resiliency import connect_rank_monitor


def test_without_the_launcher_it_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    assert connect_rank_monitor("auto") is None
    assert connect_rank_monitor(False) is None
    with pytest.raises(UserError, match="was not started by ft_launcher"):
        connect_rank_monitor(True)


def test_a_launched_rank_without_the_package_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/nowhere")
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(UserError, match=r"pip install -e .\.\[faults\]"):
        connect_rank_monitor("auto")
    assert connect_rank_monitor(False) is None


@pytest.mark.heavy
@pytest.mark.distributed
def test_a_hung_job_is_restarted_by_the_rank_monitor(tmp_path: Path) -> None:
    pytest.importorskip("nvidia_resiliency_ext")
    write_tiny_shards(tmp_path / "shards")
    launch = (
        "--nnodes=1",
        "--nproc-per-node=2",
        "--max-restarts=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--ft-rank-section-timeouts=setup:100,step:6,checkpointing:60,validation:60",
        "--ft-enable-nic-monitor=false",
        "--ft-workload-check-interval=1",
    )
    overrides = ["training.steps=12", "faults.hang_seconds=null", "faults.resiliency_ext=true"]
    arguments = command(tmp_path, "run", *overrides, launch=launch)
    arguments[arguments.index("torch.distributed.run")] = "nvidia_resiliency_ext.fault_tolerance.launcher"
    sleeping = {"kind": "sleep", "rank": 1, "step": 7, "seconds": 1000}
    result = subprocess.run(
        arguments,
        env=environment(tmp_path / "run", [sleeping]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    assert "FT timeout elapsed" in result.stdout
    assert [event["step"] for event in read_events(tmp_path / "run", "resume")] == [5]
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))
