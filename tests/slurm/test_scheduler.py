"""What slurm/scheduler.py reads from a real SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cluster

from slurm.scheduler import SlurmError, compress, expand, job_records, nodes, partition, queued, submit


def test_a_job_from_the_queue_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsleep 2\nexit 7\n")
    job = submit(["--job-name=short", "--nodes=2", "--time=5", f"--output={tmp_path}/log"], str(script))
    (found,) = queued(f"--jobs={job}")
    assert (found.job_id, found.name) == (job, "short")
    assert cluster.wait(job) == ["FAILED"]
    (record,) = job_records(job)
    assert (record["ExitCode"], record["NumNodes"]) == ("7:0", "2")
    assert queued(f"--jobs={job}") == []


def test_partitions_and_nodes(cluster: Cluster) -> None:
    default, short = partition(None), partition("short")
    assert (default.name, default.max_seconds) == ("gpu", None)
    assert (short.max_seconds, short.max_nodes) == (600, 2)
    with pytest.raises(SlurmError, match="partition 'gpus': there is none; partitions: gpu, "):
        partition("gpus")
    found = {node.name: node for node in nodes()}
    assert sorted(found) == ["node1", "node2", "node3"]
    assert (found["node1"].gpus, found["node1"].cpus) == (8, 16)
    assert "short" in found["node1"].partitions


def test_host_lists(cluster: Cluster) -> None:
    assert expand("node[1-2],other7") == ["node1", "node2", "other7"]
    assert compress(["node2", "node1"]) == "node[1-2]"


def test_a_controller_that_is_away_for_a_while_is_asked_again(cluster: Cluster) -> None:
    cluster.node("ctld-kill")
    with pytest.raises(SlurmError):
        queued(patience=1.0)
    cluster.node("ctld-start")
    # A controller that was killed may have forgotten the end of a job; that it answers is what counts here.
    assert isinstance(queued(patience=30.0), list)


def test_what_sbatch_refuses_is_told_in_its_words(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n")
    with pytest.raises(SlurmError, match=r"(?i)partition"):
        submit(["--partition=none"], str(script))
