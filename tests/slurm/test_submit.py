"""From `slurm submit` to `slurm resume` on a real SLURM: what is refused, and what a whole life looks like."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster
from refusals import HELD, REFUSALS, Refusal, make_inputs, own_inputs, pretrain, slurm_command

from slurm.scheduler import queued


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user works."""
    path = tmp_path_factory.mktemp("user")
    make_inputs(path)
    return path


def told(folder: Path, *words: str) -> Any:
    """JSON of a command that succeeds."""
    result = slurm_command(folder, *words, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what.replace(" ", "-"))
def test_refused_before_submission(cluster: Cluster, folder: Path, refusal: Refusal, tmp_path: Path) -> None:
    inputs, folder = folder, tmp_path / "user"
    own_inputs(inputs, folder)
    if refusal.before is not None:
        refusal.before(folder)
    before = {job.job_id for job in queued()}
    try:
        result = slurm_command(folder, *refusal.command())
    finally:
        left = {job.job_id for job in queued()} - before
        if refusal.after is not None:
            refusal.after(folder)
    assert result.returncode == 2, result.stdout
    assert [text for text in refusal.told if text not in result.stderr] == [], result.stderr
    assert left == set()
    assert not list(folder.glob("run/slurm/0*")), "a job's folder was left behind"


def test_dry_run_shows_everything_and_submits_nothing(cluster: Cluster, folder: Path) -> None:
    shown = told(folder, *pretrain("run.output_dir=shown", "--dry-run", "--nodes", "2", "--time", "30"))
    assert shown["sbatch"][0] == "sbatch"
    assert {"--nodes=2", "--time=30", "--signal=B:USR1@60", f"--chdir={folder}"} <= set(shown["sbatch"])
    assert f"output_dir: {folder}/shown" in shown["config"]
    assert "export OMP_NUM_THREADS=1" in shown["environment"]
    assert any("to start at" in note for note in shown["notes"])
    assert queued() == []
    assert not (folder / "shown").exists()


def test_two_submissions_at_once_give_one_job(cluster: Cluster, folder: Path) -> None:
    """Of one run, which a lock decides; and of one name for two runs, which only SLURM's numbers can."""
    for runs in (["both", "both"], ["one", "two"]):
        commands = [pretrain(*HELD, "--name", "twin", f"run.output_dir={run}", "--no-check", "dry-run") for run in runs]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda words: slurm_command(folder, *words), commands))
        assert sorted(result.returncode for result in results) == [0, 2], [result.stderr for result in results]
        assert len(queued("--name=twin")) == 1
        subprocess.run(["scancel", "--name=twin"], check=True)


def test_life_of_a_training(cluster: Cluster, folder: Path) -> None:
    """Submitted as a chain, followed, cancelled so that it saves, resumed to its end with the same code."""
    run = folder / "life"
    submitted = told(
        folder,
        *pretrain("run.output_dir=life", "--nodes", "2", "--time", "30", "--chain", "2"),
        *("--set", "preflight.enabled=false", "training.save_every=1000"),
    )
    first, second = submitted["jobs"]
    (state,) = told(folder, "status", "life")
    assert (state["job"], state["chained"], state["progress"]["total_steps"]) == (first, [second], 4000)
    wait_for_step(folder, run, 20)
    (state,) = told(folder, "status", first)
    assert (state["state"], state["nodes"], state["starts"]) == ("running", "node[1-2]", 1)
    assert state["progress"]["step"] >= 20
    assert state["progress"]["loss"] > 0
    logs = slurm_command(folder, "logs", "life", "--node", "node1", "--lines", "0")
    assert "step 10/4000" in logs.stdout

    cluster.node("ctld-kill")
    away = slurm_command(folder, "status", "life", "--patience", "1", "--json")
    cluster.node("ctld-start")
    (state,) = json.loads(away.stdout)
    assert (away.returncode, state["state"]) == (3, "unknown")
    assert "does not answer" in state["reason"]
    assert state["progress"]["step"] >= 20

    cancelled = slurm_command(folder, "cancel", "life", "--reason", "a better idea")
    assert cancelled.returncode == 0, cancelled.stderr
    assert f"cancelled {second} (pending)" in cancelled.stdout
    assert queued() == []
    done = last_step(run)
    # Saved where it stood, which is no step that it saves at by itself.
    assert f"it goes on from checkpoints/step_{done:08d} (last step {done})" in cancelled.stdout
    stopped = slurm_command(folder, "status", "life")
    assert stopped.returncode == 1
    assert "a better idea" in stopped.stdout

    resumed = told(folder, "resume", "life", "--same-code", f"training.steps={done + 10}", "--chain", "1")
    assert resumed["code"] == submitted["code"]
    assert cluster.wait(resumed["jobs"][-1], 480) == ["COMPLETED"]
    assert last_step(run) == done + 10
    (state,) = told(folder, "status", "life")
    assert (state["state"], state["verdict"], state["starts"]) == ("done", "finished", 2)
    again = slurm_command(folder, "resume", "life", "--no-check", "dry-run")
    assert again.returncode == 2
    assert "is finished" in again.stderr
    # The first start's log is still to be had.
    assert "step 10/4000" in slurm_command(folder, "logs", "life", "--attempt", "1", "--lines", "0").stdout


def test_error_of_a_rank_is_found_over_all_nodes(cluster: Cluster, folder: Path) -> None:
    """The configuration is spoiled after the checks: a rank then says why it cannot start."""
    submitted = told(
        folder,
        *pretrain(*HELD, "run.output_dir=spoiled", "--nodes", "2", "--no-check", "dry-run"),
        *("--set", "preflight.enabled=false"),
    )
    config = Path(submitted["folder"]) / "config.yaml"
    config.write_text(config.read_text().replace("num_layers:", "num_layer:"))
    subprocess.run(["scontrol", "release", submitted["jobs"][0]], check=True)
    assert cluster.wait(submitted["jobs"][0], 480) == ["FAILED"]
    status = slurm_command(folder, "status", "spoiled")
    assert status.returncode == 1
    assert "no restart" in status.stdout
    errors = slurm_command(folder, "logs", "spoiled", "--errors")
    assert "unknown field 'model.num_layer'" in errors.stdout
    refused = slurm_command(folder, "resume", "spoiled", "--no-check", "dry-run")
    assert refused.returncode == 2
    assert "num_layer" in refused.stderr


def wait_for_step(folder: Path, run: Path, step: int, seconds: float = 480.0) -> None:
    deadline = time.monotonic() + seconds
    while last_step(run) < step:
        assert time.monotonic() < deadline, slurm_command(folder, "logs", str(run), "--batch").stdout
        time.sleep(0.3)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
