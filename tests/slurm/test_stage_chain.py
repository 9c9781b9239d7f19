"""Stages of a curriculum as jobs of their own, each on its own nodes, to the losses of one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Cluster
from fault_runs import SETTINGS
from tiny_shards import write_tiny_shards

from megatron_video.cli import run_command
from slurm.chain_record import find_chain
from slurm.chain_status import chain_states
from slurm.command import main as slurm_command
from training.curriculum import main as run_curriculum

STAGES = {"narrow": 1, "wide": 2}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_stages_on_their_own_nodes_train_as_one_process_does(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_tiny_shards(tmp_path / "shards")
    curriculum = tmp_path / "two.yaml"
    stages = {name: {"settings": {"training": {"steps": 3}}} for name in STAGES}
    curriculum.write_text(json.dumps({"output_dir": "none", "stages": stages | {"later": {}}}))
    words = [f"--config={curriculum}", f"common.data.shards=[{shards}]", *(f"common.{field}" for field in SETTINGS)]
    profile = Path(__file__).parent / "training_profile.yaml"
    out, alone = tmp_path / "out", tmp_path / "alone"
    submit = ["submit", "stages", f"--profile={profile}", "--set=shared_folders=[/tmp]", "--time=15"]
    submit += ["--through=wide", "--no-check=dry-run"]
    # Wrong nodes are refused by the stage's name.
    assert run_command(slurm_command, [*submit, "--nodes=1,later=2", f"output_dir={out}", *words]) == 2
    assert "later=2: no such stage ahead; there are narrow, wide" in capsys.readouterr().err
    assert run_command(slurm_command, [*submit, "--nodes=1,wide=2", f"output_dir={out}", *words]) == 0
    record = find_chain(str(out))
    assert record is not None
    for number in record.numbers():
        cluster.wait(number, 400)
    states = chain_states(record)
    assert [state.state for state in states] == ["done", "done"], states
    capsys.readouterr()
    # The stages of the chain, and below them the trainings as they stand.
    assert run_command(slurm_command, ["status", str(out)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"wide +done +1/1", told)
    assert re.search(r"out-wide +done .* 3\b", told)
    assert json.loads((out / "curriculum.json").read_text())["finished"] == dict.fromkeys(STAGES, 3)
    for name, nodes in STAGES.items():
        info = [json.loads(line) for line in (out / name / "slurm" / "attempts.jsonl").read_text().splitlines()]
        assert len(info[-1]["nodes"]) == nodes
    assert run_command(run_curriculum, ["--through=wide", *words, f"output_dir={alone}"]) == 0
    for name in STAGES:
        ours, theirs = losses(out / name), losses(alone / name)
        assert [step for step, _ in ours] == [step for step, _ in theirs] == [1, 2, 3]
        assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)
