"""Chains on a real cluster: what a failure cancels and what not, going on, throttling, all or none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster

from megatron_video.cli import run_command
from slurm import chain_submit
from slurm.chain_record import ChainRecord, find_chain
from slurm.chain_status import StageState, chain_states
from slurm.command import main as slurm_command
from slurm.job import Job
from slurm.results import Result, read_results
from slurm.scheduler import queued


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.yaml"
    slurm = {"partition": "gpu", "gpus_per_node": 0, "cpus_per_node": 2, "memory_per_node": "1G"}
    path.write_text(json.dumps({"slurm": slurm, "shared_folders": ["/tmp"]}))
    return f"--profile={path}"


def measured(folder: Path) -> Path:
    """What `slurm evaluations`, the quickest command there is, reads: without it that command fails."""
    (folder / "step_00000001").mkdir(parents=True, exist_ok=True)
    report = {"videos": 1, "no_foreground": 0, "no_motion": 0}
    (folder / "step_00000001" / "measure.json").write_text(json.dumps(report))
    return folder


def submit(tmp_path: Path, profile: str, stages: list[dict[str, Any]], *options: str) -> int:
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps({"name": "four", "run_dir": str(tmp_path / "run"), "stages": stages}))
    return run_command(slurm_command, ["submit", "chain", profile, str(path), *options])


def record_of(tmp_path: Path) -> ChainRecord:
    record = find_chain(str(tmp_path / "run"))
    assert record is not None
    return record


def ended(cluster: Cluster, tmp_path: Path) -> dict[str, StageState]:
    for number in record_of(tmp_path).numbers():
        cluster.wait(number, 180)
    return {state.name: state for state in chain_states(record_of(tmp_path))}


def table(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"command": f"slurm evaluations {folder} --write", "time": "5", **fields}


def test_a_failing_stage_cancels_what_needs_it_and_resume_goes_on_from_there(
    cluster: Cluster, tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = measured(tmp_path / "good"), tmp_path / "bad"
    stages = [
        table(good, name="first"),
        table(bad, name="middle"),
        table(good, name="last"),
        table(good, name="whatever", after=[], after_any=["middle"]),
    ]
    assert submit(tmp_path, profile, stages) == 0
    states = ended(cluster, tmp_path)
    assert {name: state.state for name, state in states.items()} == {
        "first": "done",
        "middle": "failed",
        "last": "cancelled",
        "whatever": "done",
    }
    capsys.readouterr()
    # As a user asks; a program reads the exit code.
    assert run_command(slurm_command, ["status", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().out
    assert f"error: {bad}: nothing is measured there yet" in told
    assert "middle did not succeed" in told
    assert "megatron-video slurm resume" in told
    measured(bad)
    assert run_command(slurm_command, ["resume", str(tmp_path / "run")]) == 0
    assert [state.state for state in ended(cluster, tmp_path).values()] == ["done"] * 4
    jobs = record_of(tmp_path).jobs
    assert {name: len(numbers) for name, numbers in jobs.items()} == {"first": 1, "middle": 2, "last": 2, "whatever": 1}
    assert run_command(slurm_command, ["status", str(tmp_path / "run"), "--json"]) == 0


def test_no_more_tasks_run_at_once_than_are_allowed(
    cluster: Cluster, tmp_path: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eight units on a cluster that allows arrays of four tasks: two a task, two tasks at once.
    monkeypatch.setattr(chain_submit, "max_array_size", lambda: 4)
    good = measured(tmp_path / "good")
    assert submit(tmp_path, profile, [table(good, name="many", array=8, throttle=2)]) == 0
    (state,) = ended(cluster, tmp_path).values()
    assert (state.state, state.done) == ("done", 8)
    results = read_results(record_of(tmp_path).stage_dir("many") / "results", 8)
    assert len({result.job for result in results.values()}) == 4
    assert max(under_way(result, list(results.values())) for result in results.values()) == 2


def under_way(one: Result, results: list[Result]) -> int:
    """How many units are under way in the middle of this one."""
    moment = one.started + one.seconds / 2
    return sum(result.started <= moment <= result.started + result.seconds for result in results)


def test_a_chain_of_which_one_job_is_refused_leaves_nothing(cluster: Cluster, tmp_path: Path, profile: str) -> None:
    good = measured(tmp_path / "good")
    stages = [table(good, name="first"), table(good, name="second"), table(good, name="huge", memory_gb=1e6)]
    # By the checks, and where they are left out by SLURM itself.
    assert submit(tmp_path, profile, stages) == 2
    assert submit(tmp_path, profile, stages, "--no-check=cluster") == 2
    assert not [job for job in queued() if job.name.startswith("four-") and job.state != "COMPLETING"]
    assert not (tmp_path / "run").exists()


def test_a_submission_that_is_killed_has_started_nothing_and_resume_completes_it(
    cluster: Cluster, tmp_path: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = measured(tmp_path / "good")
    stages = [table(good, name=name) for name in ("first", "second", "third")]
    child = os.fork()
    if child == 0:
        submitted: list[str] = []

        def killed(job: Job, numbers: list[str]) -> None:
            submitted.extend(numbers)
            if len(submitted) == 2:
                os._exit(9)

        monkeypatch.setattr(chain_submit, "remember", killed)
        submit(tmp_path, profile, stages)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    time.sleep(3)
    states = chain_states(record_of(tmp_path))
    assert [(state.state, state.why) for state in states[:2]] == [("waiting", "JobHeldUser"), ("waiting", "Dependency")]
    assert states[2].state == "not submitted"
    assert run_command(slurm_command, ["resume", str(tmp_path / "run")]) == 0
    assert [state.state for state in ended(cluster, tmp_path).values()] == ["done"] * 3
    assert [len(jobs) for jobs in record_of(tmp_path).jobs.values()] == [1, 1, 1]
