"""Jobs on checkpoints, on a real cluster: converted and back, sampled from by ranks of two nodes and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cluster
from tiny_models import write_tiny_models

from checkpoints_tools.cli import main as checkpoints
from megatron_video.cli import run_command
from slurm.chain_record import find_chain
from slurm.chain_status import chain_states
from slurm.command import main as slurm_command
from slurm.job import load_job


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder, ["a red circle moves left", "a blue square moves up"])
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.yaml"
    slurm = {"partition": "gpu", "gpus_per_node": 0, "cpus_per_node": 2, "memory_per_node": "4G"}
    path.write_text(json.dumps({"slurm": slurm, "shared_folders": ["/tmp"], "environment": {"OMP_NUM_THREADS": "1"}}))
    return f"--profile={path}"


def succeeded(cluster: Cluster, output: Path) -> bool:
    record = find_chain(str(output))
    assert record is not None
    for number in record.numbers():
        cluster.wait(number, 300)
    states = chain_states(record)
    assert [state.state for state in states] == ["done"] * len(states), states
    return True


def test_a_conversion_and_its_round_trip(cluster: Cluster, models: Path, tmp_path: Path, profile: str) -> None:
    words = ["submit", "convert", profile, "--in", str(models / "run"), "--out", str(tmp_path / "released")]
    # Refused before anything is submitted, in the words of the conversion.
    assert run_command(slurm_command, [*words[:-1], str(models)]) == 2
    assert run_command(slurm_command, [*words, "--round-trip"]) == 0
    assert succeeded(cluster, tmp_path / "released")
    record = find_chain(str(tmp_path / "released"))
    assert record is not None
    job, _ = load_job(Path(record.jobs["convert"][0].folder))
    assert (job.gpus_per_node, job.cpus) == (0, 2)
    assert job.memory_mib is not None
    assert 1024 <= job.memory_mib <= 1400
    assert run_command(checkpoints, ["diff", str(models / "run"), str(tmp_path / "released")]) == 0


def test_a_checkpoint_is_sampled_from_and_measured(
    cluster: Cluster, models: Path, tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluations"
    files = [f"--vae={models / 'vae'}", f"--text={models / 'text'}", f"--prompts={models / 'prompts.txt'}"]
    size = ["--frames=17", "--height=32", "--width=48", "--steps=2", "--guidance=1"]
    words = ["submit", "evaluate", profile, f"--watch={models / 'run'}", "--once", f"--out={out}", *files, *size]
    assert run_command(slurm_command, [*words, "--nodes=2"]) == 0
    assert succeeded(cluster, out / "step_00000007")
    assert sorted(path.suffix for path in (out / "step_00000007" / "samples").glob("*.mp4")) == [".mp4", ".mp4"]
    (row,) = json.loads((out / "evaluations.json").read_text())
    assert (row["step"], row["videos"]) == (7, 2)
    assert "| 7 | 2 |" in (out / "evaluations.md").read_text()
    capsys.readouterr()
    # The run has no other checkpoint.
    assert run_command(slurm_command, words) == 0
    assert capsys.readouterr().out == ""
