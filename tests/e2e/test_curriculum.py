"""The tiny ladder as one curriculum: stages chain, a finished one is not redone, a killed one continues."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_shards import CLIP_DIM, LATENT_CHANNELS, LLM_DIM, write_tiny_shards
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_video.cli import run_command
from training.curriculum import main

pytestmark = pytest.mark.distributed

STAGES = ["t2i", "t2vi_low", "t2vi_high", "sft"]
TOKENS = {"1x48x48": 9, "17x48x48": 27, "17x48x64": 36}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shards(
        tmp_path_factory.mktemp("shards"), {"1x48x48": 40, "17x48x48": 24, "17x48x64": 16}, learnable=True
    )


def arguments(shards: Path, out: Path, *overrides: str) -> list[str]:
    model = [
        f"common.model.in_channels={LATENT_CHANNELS}",
        f"common.model.out_channels={LATENT_CHANNELS}",
        f"common.model.caption_channels=[{LLM_DIM},{CLIP_DIM}]",
    ]
    return ["--config", "tiny", f"output_dir={out}", f"common.data.shards=[{shards}]", *model, *overrides]


def run_here(shards: Path, out: Path, *overrides: str) -> int:
    return run_command(main, arguments(shards, out, *overrides))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tensors(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint whose names start with `prefix` (none: the weights), read without megatron-core."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    others = ("optimizer.", "ema.")
    state = {
        name: torch.empty(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
        and (name.startswith(prefix) if prefix else not name.startswith(others))
    }
    assert len(state) > 40
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def step(out: Path, stage: str, number: int) -> Path:
    return out / stage / "checkpoints" / f"step_{number:08d}"


@pytest.fixture(scope="module")
def ladder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ladder")
    assert run_here(shards, out, "common.training.save_initial=true") == 0
    return out


def test_every_stage_ends_and_the_loss_falls(ladder: Path) -> None:
    assert json.loads((ladder / "curriculum.json").read_text())["finished"] == {
        "t2i": 60,
        "t2vi_low": 60,
        "t2vi_high": 60,
        "sft": 30,
    }
    losses = {stage: [line["loss"] for line in metrics(ladder / stage)] for stage in STAGES}
    assert [len(losses[stage]) for stage in STAGES] == [60, 60, 60, 30]
    assert sum(losses["t2i"][-10:]) < 0.3 * sum(losses["t2i"][:10])
    # Nothing is learnt anew: no later stage begins where the first one began.
    assert all(sum(losses[stage][:5]) < 0.4 * sum(losses["t2i"][:5]) for stage in STAGES[1:])
    assert sum(losses["t2vi_low"][-10:]) < sum(losses["t2vi_low"][:10])


def test_weights_and_averages_are_handed_on(ladder: Path) -> None:
    for before, stage in (("t2i", "t2vi_low"), ("t2vi_low", "t2vi_high")):
        assert_equal(tensors(step(ladder, before, 60)), tensors(step(ladder, stage, 0)))
    averages = tensors(step(ladder, "t2vi_high", 60), "ema.")
    assert_equal(averages, tensors(step(ladder, "sft", 0)))
    trained = tensors(step(ladder, "t2vi_high", 60))
    assert not all(torch.equal(trained[name], average) for name, average in averages.items())


def test_buckets_change_from_stage_to_stage(ladder: Path) -> None:
    wanted = {
        "t2i": {"1x48x48"},
        "t2vi_low": {"1x48x48", "17x48x48"},
        "t2vi_high": {"1x48x48", "17x48x48", "17x48x64"},
        "sft": {"17x48x64"},
    }
    for stage, buckets in wanted.items():
        last = max((ladder / stage / "checkpoints").glob("step_*"))
        consumed = json.loads((last / "train_state.json").read_text())["consumed_samples"]
        assert {name.split("/")[-1] for name, count in consumed.items() if count} == buckets
        lines = metrics(ladder / stage)
        possible = {TOKENS[name] for name in buckets}
        assert all(min(possible) <= line["tokens"] / line["samples"] <= max(possible) for line in lines)


def test_schedules_are_those_of_the_presets(ladder: Path) -> None:
    rates = {stage: [line["learning_rate"] for line in metrics(ladder / stage)] for stage in STAGES}
    assert rates["t2i"] == pytest.approx([3e-3 * min((k + 1) / 10, 1) for k in range(60)])
    wsd = [2e-3 * min((k + 1) / 5, 1) for k in range(45)] + [2e-3 * (1 - math.sqrt(k / 15)) for k in range(1, 16)]
    assert rates["t2vi_low"] == pytest.approx(wsd, abs=1e-12)
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * k / 54)) / 2 for k in range(55)]
    assert rates["t2vi_high"][5:] == pytest.approx(cosine)
    assert rates["sft"][5:] == [5e-4] * 25


def test_a_finished_curriculum_does_nothing(ladder: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {stage: len(metrics(ladder / stage)) for stage in STAGES}
    assert run_here(shards, ladder) == 0
    assert {stage: len(metrics(ladder / stage)) for stage in STAGES} == before
    assert capfd.readouterr().out.count("(finished)") == 4
    # A finished stage may have had another job, of more ranks.
    assert run_here(shards, ladder, "stages.t2i.settings.parallel.tensor_model_parallel_size=2") == 0
    assert run_here(shards, ladder / "new", "stages.t2i.settings.parallel.tensor_model_parallel_size=2") == 2


def test_changes_of_what_is_finished_are_refused(ladder: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here(shards, ladder, "stages.t2i.settings.training.steps=70") == 2
    assert "'t2i' was finished after 60 steps and 't2vi_low' has begun" in capfd.readouterr().err
    text = f"output_dir: {ladder}\nstages: {{t2vi_low: {{preset: tiny_t2vi_low}}}}\n"
    (ladder / "other.yaml").write_text(text)
    settings = arguments(shards, ladder)[3:]
    assert run_command(main, ["--config", str(ladder / "other.yaml"), *settings]) == 2
    assert "was run with other stages" in capfd.readouterr().err


def test_the_optimizer_can_be_handed_on(shards: Path, tmp_path: Path) -> None:
    overrides = ["common.training.steps=3", "common.training.save_initial=true"]
    overrides += ["common.optimizer={warmup_steps: 0, decay: constant, decay_steps: null, decay_shape: null}"]
    overrides += ["stages.t2vi_low.take=weights_and_optimizer"]
    command = [*arguments(shards, tmp_path, *overrides), "--through", "t2vi_low"]
    assert run_command(main, command) == 0
    last, first = step(tmp_path, "t2i", 3), step(tmp_path, "t2vi_low", 0)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert_equal(tensors(last, f"optimizer.state.{name}."), tensors(first, f"optimizer.state.{name}."))
    assert not (tmp_path / "t2vi_high").exists()


@pytest.mark.heavy
def test_killed_in_the_second_stage_and_continued_by_two_ranks(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    steps = {"t2i": 12, "t2vi_low": 30, "t2vi_high": 6, "sft": 6}
    faster = [f"stages.{stage}.settings.training.steps={count}" for stage, count in steps.items()]
    faster.append("common.training.save_every=6")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "training.curriculum", *arguments(shards, out, *faster)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not any(line["step"] >= 15 for line in metrics(out / "t2vi_low")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()
    process.communicate()
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ.copy())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "t2i: 12 steps" in result.stdout
    assert result.stdout.count("(finished)") == 1
    assert len(metrics(out / "t2i")) == 12
    lines = metrics(out / "t2vi_low")
    first, second = ({line["step"]: line for line in lines if line["life"] == life} for life in (1, 2))
    assert min(second) > 6
    assert (min(second) - 1) % 6 == 0
    assert max(second) == 30
    again = sorted(first.keys() & second.keys())
    assert again
    for number in again:
        assert first[number]["loss"] == second[number]["loss"]
    assert len(metrics(out / "sft")) == 6
