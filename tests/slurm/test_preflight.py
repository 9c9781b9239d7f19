"""Preflight on a real SLURM, with faults of nodes: a full disk, a wrong clock, a slow link, a dead node, lost GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import LAB, Cluster
from tiny_shards import write_tiny_shards
from training_jobs import profile, submit_training

from slurm.bad_nodes import read_bad_nodes
from slurm.scheduler import nodes

NODES = "node[1-3]"
LOCAL = "/tmp/local"
# Checks that start torch on every node; tests of others leave them out.
NO_BURN = ("preflight.max_gemm_errors=null",)
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@dataclass(frozen=True)
class Result:
    """What `megatron-video slurm preflight` did."""

    code: int
    report: dict[str, Any]
    said: str

    @property
    def bad(self) -> dict[str, str]:
        """Node -> check that it failed."""
        return {finding["name"]: finding["check"] for finding in self.report.get("bad", [])}

    @property
    def reasons(self) -> dict[str, str]:
        return {finding["name"]: finding["reason"] for finding in self.report.get("bad", [])}


def slurm(*words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """A `megatron-video slurm` command."""
    command = [sys.executable, "-m", "megatron_video", "slurm", *words]
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def preflight(folder: Path, *settings: str, listed: str = NODES, path: str = "") -> Result:
    """Check nodes by hand, with the profile of a small CPU cluster."""
    own = [f"preflight.local_folder={LOCAL}", "preflight.min_local_free_gib=0.1", *settings]
    words = [word for setting in own for word in ("--set", setting)]
    place = ["--folder", str(folder / "preflight")]
    result = slurm("preflight", "--profile", "cpu_lab", "--nodes", listed, *place, "--json", *words, path=path)
    report = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    return Result(result.returncode, report, result.stderr)


@contextmanager
def mounted(cluster: Cluster, node: str, *words: str, at: str) -> Iterator[None]:
    """A file system mounted on one node, for the time of a block."""
    cluster.node("enter", node, "mount", *words, at)
    try:
        yield
    finally:
        cluster.node("enter", node, "umount", "--lazy", at)


@contextmanager
def wrong_clock(cluster: Cluster, node: str, offset: str, folder: Path) -> Iterator[None]:
    """Every process that starts on a node sees another time: libfaketime, preloaded for all by the node's /etc."""
    copy = folder / f"etc-{node}"
    subprocess.run(["cp", "-a", "/etc", copy], check=True)
    # What is mounted into the node's own /etc.
    subprocess.run(["cp", "-a", f"{cluster.folder}/etc/.", copy / "slurm"], check=True)
    subprocess.run(["cp", f"{cluster.folder}/etc/hosts", copy / "hosts"], check=True)
    (copy / "ld.so.preload").write_text(f"{FAKETIME}\n")
    (copy / "faketimerc").write_text(f"{offset}\n")
    with mounted(cluster, node, "--bind", str(copy), at="/etc"):
        yield


@contextmanager
def throttled(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """The processes of the burn on one node are stopped for most of the time."""
    flag, script = folder / "throttle", folder / "throttle.sh"
    # In the node's own process namespace: nothing else is seen from there.
    stop = "pkill -STOP -f 'slurm[.]burn'; sleep 0.2; pkill -CONT -f 'slurm[.]burn'; sleep 0.02"
    script.write_text(f"while [ -e {flag} ]; do {stop}; done\n")
    flag.touch()
    process = subprocess.Popen([LAB / "node.sh", "enter", node, "bash", str(script)])
    try:
        yield
    finally:
        flag.unlink()
        process.wait(30)


def test_a_full_disk_and_a_wrong_clock_are_named_drained_and_remembered(cluster: Cluster, tmp_path: Path) -> None:
    if not FAKETIME.is_file():
        pytest.skip("libfaketime is not installed (apt-get install faketime)")
    scores = tmp_path / "scores"
    settings = [*NO_BURN, "preflight.action=drain", f"preflight.scores={scores}"]
    full = mounted(cluster, "node2", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at=LOCAL)
    with full, wrong_clock(cluster, "node3", "+30s", tmp_path):
        found = preflight(tmp_path, *settings)
    assert (found.code, found.bad) == (1, {"node2": "local space", "node3": "clock"}), found.said
    assert "0.0009766 GiB, at least 0.1 GiB is asked (preflight.min_local_free_gib)" in found.reasons["node2"]
    skews = {name: figures["clock_offset"] for name, figures in found.report["nodes"].items()}
    # Measured against the host's clock over srun's pipe, so late by its way at most.
    assert skews["node3"] == pytest.approx(30.0, abs=1.0)
    assert abs(skews["node1"]) < 1.0
    assert "node2 is bad: local space" in found.said

    states = {node.name: node for node in nodes()}
    assert "DRAIN" not in states["node1"].state
    assert "DRAIN" in states["node2"].state
    assert states["node3"].reason.startswith("preflight clock: ")
    again = preflight(tmp_path, *settings)
    assert again.code == 2
    assert "drained or down: node2 (IDLE+DRAIN: preflight local space" in again.said

    ranked = json.loads(slurm("nodes", "--scores", str(scores), "--json").stdout)
    by_node = {standing["node"]: standing for standing in ranked}
    assert by_node["node2"]["last_refusal"] == "local space"
    # The clock that is off shows in the figures too, and puts its node first.
    assert (ranked[0]["node"], ranked[0]["worst"]) == ("node3", "skew_seconds")


def test_a_dead_node_is_named_before_slurm_knows(cluster: Cluster, tmp_path: Path) -> None:
    cluster.node("crash", "node2")
    try:
        found = preflight(tmp_path, *NO_BURN, "preflight.seconds=15")
    finally:
        cluster.node("start", "node2")
    assert list(found.bad) == ["node2"], found.said
    assert found.bad["node2"] in ("answer", "state")
    assert set(found.report["nodes"]) == {"node1", "node3"}


def test_a_slow_link_is_found_by_halving(cluster: Cluster, tmp_path: Path) -> None:
    # A node's own network interface, held to 40 Mbit/s by the kernel; the others pass many times that.
    slow = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "50ms"]
    cluster.node("enter", "node2", *slow)
    floor = "preflight.min_allreduce_gb_s=0.015"
    try:
        found = preflight(tmp_path, *NO_BURN, floor, "preflight.allreduce_mib=2")
    finally:
        cluster.node("enter", "node2", "tc", "qdisc", "del", "dev", "eth0", "root")
    assert found.bad == {"node2": "all-reduce"}, found.said
    assert "at least 0.015 GB/s is asked (preflight.min_allreduce_gb_s)" in found.reasons["node2"]
    # The whole was measured again without it.
    assert found.report["nodes"]["node1"]["allreduce_gb_s"] > 0.015 > found.report["nodes"]["node2"]["allreduce_gb_s"]


def test_a_slow_processor_is_refused_and_ranked_last(cluster: Cluster, tmp_path: Path) -> None:
    burn = ["preflight.gemm_seconds=4", "preflight.gemm_size=256"]
    sound = preflight(tmp_path, *burn)
    assert sound.bad == {}, sound.said
    rates = [figures["gemm_tflops"] for figures in sound.report["nodes"].values()]
    with throttled(cluster, "node3", tmp_path):
        found = preflight(tmp_path, *burn, f"preflight.min_gemm_tflops={0.5 * min(rates)}")
    assert found.bad.get("node3") == "gemm", found.said


def test_gpus_that_are_lost_or_unsound_are_named(cluster: Cluster, tmp_path: Path) -> None:
    """The program nvidia-smi is a stand-in there (tests/slurm/lab/bin); SLURM, nodes and verdicts are real."""
    for node in ("node1", "node2", "node3"):
        cluster.node(
            "enter", node, "sh", "-c", f"rm -rf {LOCAL}/gpus; mkdir {LOCAL}/gpus; cd {LOCAL}/gpus; touch 0 1 2 3"
        )
    cluster.node("enter", "node2", "rm", f"{LOCAL}/gpus/3")
    cluster.node("enter", "node3", "sh", "-c", f"echo slowdown=0x40 >{LOCAL}/gpus/1")
    settings = ["slurm.gpus_per_node=4", "preflight.nvlinks=18", *NO_BURN]
    found = preflight(tmp_path, *settings, path=str(LAB / "bin"))
    assert found.bad == {"node2": "gpus", "node3": "throttling"}, found.said
    assert found.reasons["node2"] == "GPUs that nvidia-smi shows: 3, at least 4 is asked (preflight.gpus)"
    assert "00000000:11:00.0: hardware thermal" in found.reasons["node3"]
    assert found.report["nodes"]["node1"]["driver"] == "570.124.06"


def test_a_job_goes_on_without_a_bad_node(cluster: Cluster, tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "shards")
    checks = ["enabled=true", f"local_folder={LOCAL}", "min_free_memory_gib=null", "min_local_free_gib=0.1"]
    speeds = [f"min_{disk}_{way}=null" for disk in ("local", "shared") for way in ("read", "write")]
    chosen = profile(*(f"preflight.{check}" for check in [*checks, *speeds, "max_gemm_errors=null"]))
    with mounted(cluster, "node1", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at=LOCAL):
        job = submit_training(cluster, tmp_path, "goes_on", "training.steps=4", profile=chosen, nodes=1, spares=1)
        assert job.wait() == "COMPLETED", job.log()
    (attempt,) = job.attempts()
    assert attempt.nodes == ["node2"]
    avoided = read_bad_nodes(job.job.slurm_dir)
    assert list(avoided) == ["node1"]
    assert avoided["node1"].check == "local space"
    assert "node1 is bad: local space: free on the local disk" in job.log()
    assert {path.stem for path in (job.job.slurm_dir / "node_scores").iterdir()} == {"node1", "node2"}
