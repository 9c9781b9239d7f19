"""Video-VAE training over two gloo ranks under DeepSpeed: the numbers of one process, phases, kill and resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vae_clips_on_disk import STAGES, vae_config, write_clips

from megatron_video.vae import load_vae
from training import train_vae, vae_run
from training.local_ranks import RankError, RankPool

pytestmark = pytest.mark.distributed
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'megatron-video[vae]'")

NAMES = ("loss", "l1", "kl", "grad_norm", "learning_rate")
# Batches that two ranks share, all losses of the frames, and every phase.
PHASES = [
    {"steps": 3, "frames": 1, "crop": 16, "batch_size": 2, "kind": "base"},
    {"steps": 2, "frames": 1, "crop": 16, "batch_size": 2, "trains": "dual_path"},
    {"steps": 3, "frames": 9, "crop": 16, "batch_size": 2, "image_share": 0.5, "image_batch_size": 4},
]
ADVERSARIAL = {"weight": 0.5, "start": 6, "channels": 8, "num_layers": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _train_on_rank(configs: list[dict[str, Any]], killed_at: int | None) -> list[dict[str, Any]]:
    if killed_at is not None:
        original = vae_run.VAERun.train_step

        def killed(run: vae_run.VAERun, pixels: torch.Tensor) -> dict[str, float]:
            if run.step == killed_at and run.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(run, pixels)

        vae_run.VAERun.train_step = killed  # type: ignore[method-assign]
    return [train_vae.train(vae_config(**config)) for config in configs]


def _train(*configs: dict[str, Any], killed_at: int | None = None) -> list[dict[str, Any]]:
    """Reports of runs on two ranks, one after the other.

    The ranks are new ones: DeepSpeed keeps its first process group for the life of a process.
    """
    with RankPool(2, "cpu") as pool:
        reports: list[dict[str, Any]] = pool.run(_train_on_rank, list(configs), killed_at)[0]
        return reports


def _number_runs(manifest: Path, folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Configurations by name; the first phases do for ZeRO 1 and 3, the last adds videos and the adversarial loss."""
    # Whole pictures and a small rate: norms over a few pixels, and Adam on gradients near zero, blow rounding up.
    stages = [{**stage, "crop": None} for stage in PHASES]
    shared = {"manifest": manifest, "precision": "fp32", "learning_rate": 1e-4, "evaluate_first": False}
    short, whole = {"stages": stages[:2]}, {"stages": stages, "adversarial": ADVERSARIAL, "evaluate_first": True}
    bf16 = {"stages": [{**STAGES[0], "steps": 4, "batch_size": 4}], "precision": "bf16", "learning_rate": 1e-3}
    runs = {"zero1": short | {"zero_stage": 1}, "zero2": whole, "zero3": short | {"zero_stage": 3}, "bf16": bf16}
    return {name: shared | run | {"output": folder / device / name} for name, run in runs.items()}


@pytest.fixture(scope="module")
def numbers(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each run: the reports and the logged steps of one process and of two."""
    folder = tmp_path_factory.mktemp("numbers")
    pair_runs, alone_runs = (_number_runs(manifest, folder, device) for device in ("pair", "alone"))
    pair = dict(zip(pair_runs, _train(*pair_runs.values()), strict=True))
    # ZeRO 1 and 3 take the same steps; one process does without DeepSpeed.
    alone_runs = {name: {**run, "zero_stage": None} for name, run in alone_runs.items() if name != "zero3"}
    alone = {name: train_vae.train(vae_config(**run)) for name, run in alone_runs.items()}
    alone["zero3"] = alone["zero1"]
    return {name: {"pair": pair[name], "alone": alone[name]} for name in pair}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_give_the_numbers_of_one_process(numbers: dict[str, Any], zero_stage: int) -> None:
    alone, report = (numbers[f"zero{zero_stage}"][who] for who in ("alone", "pair"))
    assert report["layout"] == f"DeepSpeed ZeRO {zero_stage}, world size 2"
    assert alone["layout"] == "plain torch in one process"
    names = [*NAMES, *(("adversarial", "discriminator", "adversarial_scale") if zero_stage == 2 else ())]
    one, two = ([[s.get(n, 0.0) for n in names] for s in _steps(Path(r["output"]))] for r in (alone, report))
    assert len(one) == (8 if zero_stage == 2 else 5)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([s[:2] for s in two[:3]], [s[:2] for s in one[:3]], atol=1e-5, rtol=0)
    for score in ("psnr", "ssim", "kl"):
        assert report[score] == pytest.approx(alone[score], rel=1e-3)
    weights = [load_vae(r["output"]).state_dict() for r in (alone, report)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-4, msg=name)


def test_the_weights_before_training_are_scored_alike(numbers: dict[str, Any]) -> None:
    before = [numbers["zero2"][who]["before"]["psnr"] for who in ("alone", "pair")]
    assert before[1] == pytest.approx(before[0], rel=1e-5)
    assert numbers["zero1"]["pair"]["before"] is None


def test_bf16_follows_one_process_in_bf16(numbers: dict[str, Any]) -> None:
    one, two = ([s["loss"] for s in _steps(Path(numbers["bf16"][who]["output"]))] for who in ("alone", "pair"))
    np.testing.assert_allclose(two, one, rtol=2e-2)


def test_killed_ranks_resume_with_the_same_losses(manifest: Path, tmp_path: Path) -> None:
    shared = {"manifest": manifest, "stages": PHASES, "adversarial": ADVERSARIAL, "ema_decay": 0.9, "save_every": 1}
    whole, killed = (shared | {"output": tmp_path / name} for name in ("whole", "killed"))
    (report,) = _train(whole)
    # One kill right behind the first phase, one within the adversarial steps.
    for killed_at in (3, 7):
        with pytest.raises(RankError, match="exit code -9"):
            _train(killed | {"save_every": 2}, killed_at=killed_at)
        state = json.loads((tmp_path / "killed" / "checkpoint.json").read_text())
        # Step 3 and step 7 are done again.
        assert state["step"] == killed_at - 1
        (folder,) = (tmp_path / "killed" / "checkpoint").iterdir()
        assert (folder / "zero").is_dir()
    (resumed,) = _train(killed)
    assert (tmp_path / "whole" / "checkpoint" / "step_00000008" / "model.safetensors").is_file()
    drop = ("train_seconds", "output", "decode_seconds_per_clip", "before")
    assert {k: v for k, v in report.items() if k not in drop} == {k: v for k, v in resumed.items() if k not in drop}
    for line in _steps(tmp_path / "killed"):
        expected = next(s for s in _steps(tmp_path / "whole") if s["step"] == line["step"])
        assert {k: v for k, v in line.items() if k != "step_seconds"} == {
            k: v for k, v in expected.items() if k != "step_seconds"
        }
    assert load_vae(tmp_path / "killed").config.latent_channels == 2
