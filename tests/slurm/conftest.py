"""Tests against a real SLURM; tests/slurm/run.sh starts it and then pytest, both in namespaces of their own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.scheduler import job_records, queued

LAB = Path(__file__).parent / "lab"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@dataclass(frozen=True)
class Cluster:
    """The running cluster."""

    folder: Path
    """State, logs and configuration of its daemons."""

    def node(self, *words: str) -> str:
        """lab/node.sh: crash NODE, start NODE, enter NODE COMMAND, ctld-kill, ..."""
        result = subprocess.run([LAB / "node.sh", *words], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def states(self, job_id: str) -> list[str]:
        """State of a job, or of every task of an array, also after its end."""
        return [record["JobState"] for record in job_records(job_id)]

    def wait(self, job_id: str, seconds: float = 120.0) -> list[str]:
        """Wait until a job has left the queue; its states."""
        deadline = time.monotonic() + seconds
        while queued(f"--jobs={job_id}"):
            assert time.monotonic() < deadline, f"job {job_id} after {seconds:g} s: {job_records(job_id)}"
            time.sleep(0.3)
        return self.states(job_id)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster around this process."""
    if "SLURM_LAB" not in os.environ:
        pytest.skip("no SLURM here; start these tests with tests/slurm/run.sh")
    return Cluster(Path(os.environ["SLURM_LAB"]))


@pytest.fixture(autouse=True)
def _all_nodes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to nodes and jobs, the next one finds an empty cluster."""
    yield
    if "cluster" not in request.fixturenames:
        return
    subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"], check=False)
    deadline = time.monotonic() + 120
    while queued() and time.monotonic() < deadline:
        time.sleep(0.3)
    subprocess.run(["scontrol", "update", "nodename=ALL", "state=resume"], capture_output=True, check=False)
