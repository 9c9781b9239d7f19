"""Video-DPO as a chain of jobs on a real cluster: generate, score, pair, train, with what is shipped as the pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import Cluster
from tiny_models import write_tiny_models

from megatron_video.cli import run_command
from megatron_video.errors import BAD_INPUT_EXIT_CODE
from megatron_video.shards import ShardDataset
from slurm.chain import load_chain
from slurm.chain_record import find_chain
from slurm.chain_status import chain_states
from slurm.command import main as slurm_command

SHIPPED = Path(__file__).parents[2] / "slurm" / "chains" / "dpo.yaml"
PROFILE = Path(__file__).parent / "training_profile.yaml"
PROMPTS = ["a red circle moves left", "a blue square moves up", "a green circle moves down"]
SMALL = "--frames 17 --height 32 --width 48 --fps 8 --steps 2 --guidance 1 --time-shift 1"


def write_models(folder: Path) -> Path:
    """A run, its encoders, prompts, and the configuration of an alignment of it."""
    write_tiny_models(folder, PROMPTS)
    (checkpoint,) = (folder / "run" / "checkpoints").glob("step_*")
    values = {
        "model": yaml.safe_load((checkpoint / "config.yaml").read_text())["model"],
        "data": {"micro_batch_size": 1, "global_batch_size": 2, "text_dropout": 0.0},
        "training": {"steps": 4, "precision": "fp32", "save_every": 2, "log_every": 1},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
        "dpo": {"beta": 100.0},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_generate_score_pair_train(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, run_dir = write_models(tmp_path), tmp_path / "dpo"
    samples, pairs, trained = run_dir / "samples", run_dir / "pairs", run_dir / "train"
    encoders = f"--vae {models / 'vae'} --text {models / 'text'}"
    commands = {
        "generate": f"dpo generate --checkpoint {models / 'run'} {encoders} --prompts {models / 'prompts.txt'} "
        f"--seeds 2 {SMALL} --context-parallel-size 2 --out {samples}",
        "score": f"dpo score --samples {samples} --with brightness",
        "pair": f"dpo pair --samples {samples} --out {pairs} --least-difference 0",
        "train": f"dpo train --config {models / 'dpo.yaml'} run.initial_weights={models / 'run'} "
        f"run.output_dir={trained} data.shards=[{pairs}]",
    }
    shipped = {stage.name: stage for stage in load_chain(SHIPPED).stages}
    assert list(shipped)[:4] == list(commands)
    stages = [{"name": name, "command": command, "time": "30"} for name, command in commands.items()]
    # Two nodes share the tokens of every video.
    stages[0] |= {"nodes": 2, "ranks": 1}
    stages[3] |= {"kind": shipped["train"].kind, "run_dir": str(trained), "nodes": 2}
    path = tmp_path / "chain.yaml"
    one_rank = [{**stages[0], "nodes": 1}, *stages[1:]]
    path.write_text(json.dumps({"name": "dpo", "run_dir": str(run_dir), "stages": one_rank}))
    submit = ["submit", "chain", f"--profile={PROFILE}", "--local-run-folder", str(path)]
    assert run_command(slurm_command, submit) == BAD_INPUT_EXIT_CODE
    assert "dpo-generate: --context-parallel-size 2: a copy of the model takes 2 ranks" in capsys.readouterr().err
    path.write_text(json.dumps({"name": "dpo", "run_dir": str(run_dir), "stages": stages}))
    assert run_command(slurm_command, submit) == 0
    record = find_chain(str(run_dir))
    assert record is not None
    for number in record.numbers():
        cluster.wait(number, 900)
    states = {state.name: state.state for state in chain_states(record)}
    assert states == dict.fromkeys(commands, "done"), states
    assert len(ShardDataset(pairs)) == len(PROMPTS)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["preference"]["reward_margin"] == 0
    assert lines[-1]["preference"]["reward_margin"] != 0
