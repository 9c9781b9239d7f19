"""Video-VAE training over two gloo ranks under DeepSpeed: the numbers of one process, phases, kill and resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
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


@pytest.fixture
def pair() -> Iterator[RankPool]:
    """Two ranks apart from those of the other tests."""
    with RankPool(2, "cpu") as pool:
        yield pool


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _train_on_rank(config: dict[str, Any], killed_at: int | None) -> dict[str, Any]:
    if killed_at is not None:
        original = vae_run.VAERun.train_step

        def killed(run: vae_run.VAERun, pixels: torch.Tensor) -> dict[str, float]:
            if run.step == killed_at and run.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(run, pixels)

        vae_run.VAERun.train_step = killed  # type: ignore[method-assign]
    return train_vae.train(vae_config(**config))


def _train(pool: RankPool, killed_at: int | None = None, **config: Any) -> dict[str, Any]:
    report: dict[str, Any] = pool.run(_train_on_rank, config, killed_at)[0]
    # DeepSpeed keeps its first process group for the life of a process: the next run has new ones.
    pool.close()
    return report


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_give_the_numbers_of_one_process(
    manifest: Path, tmp_path: Path, pair: RankPool, zero_stage: int
) -> None:
    adversarial = ADVERSARIAL if zero_stage == 2 else {"weight": 0.0}
    # Whole pictures and a small rate: norms over a few pixels, and Adam on gradients near zero, blow rounding up.
    stages = [{**stage, "crop": None} for stage in (PHASES if zero_stage == 2 else PHASES[:2])]
    shared = {"manifest": manifest, "stages": stages, "precision": "fp32", "learning_rate": 1e-4}
    shared["adversarial"] = adversarial
    alone = train_vae.train(vae_config(output=tmp_path / "alone", **shared))
    report = _train(pair, output=tmp_path / "pair", zero_stage=zero_stage, **shared)
    assert report["layout"] == f"DeepSpeed ZeRO {zero_stage}, world size 2"
    names = [*NAMES, *(("adversarial", "discriminator", "adversarial_scale") if zero_stage == 2 else ())]
    one, two = ([[s.get(n, 0.0) for n in names] for s in _steps(tmp_path / name)] for name in ("alone", "pair"))
    assert len(one) == sum(stage["steps"] for stage in stages)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([s[:2] for s in two[:3]], [s[:2] for s in one[:3]], atol=1e-5, rtol=0)
    for score in ("psnr", "ssim", "kl"):
        assert report[score] == pytest.approx(alone[score], rel=1e-3)
    assert report["before"]["psnr"] == pytest.approx(alone["before"]["psnr"], rel=1e-5)
    weights = [load_vae(tmp_path / name).state_dict() for name in ("alone", "pair")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-4, msg=name)


def test_bf16_follows_one_process_in_bf16(manifest: Path, tmp_path: Path, pair: RankPool) -> None:
    stages = [{**STAGES[0], "steps": 4, "batch_size": 4}]
    train_vae.train(vae_config(manifest=manifest, output=tmp_path / "alone", stages=stages))
    _train(pair, manifest=manifest, output=tmp_path / "pair", stages=stages)
    one, two = ([s["loss"] for s in _steps(tmp_path / name)] for name in ("alone", "pair"))
    np.testing.assert_allclose(two, one, rtol=2e-2)


def test_killed_ranks_resume_with_the_same_losses(manifest: Path, tmp_path: Path, pair: RankPool) -> None:
    shared = {"manifest": manifest, "stages": PHASES, "adversarial": ADVERSARIAL, "ema_decay": 0.9, "save_every": 1}
    report = _train(pair, output=tmp_path / "whole", **shared)
    # One kill right behind the first phase, one within the adversarial steps; checkpoints are there or one step old.
    for killed_at in (3, 7):
        with pytest.raises(RankError, match="exit code -9"):
            _train(pair, killed_at, output=tmp_path / "killed", **{**shared, "save_every": 1 + killed_at % 2})
        state = json.loads((tmp_path / "killed" / "checkpoint.json").read_text())
        assert state["step"] < killed_at + 1
        (folder,) = (tmp_path / "killed" / "checkpoint").iterdir()
        assert (folder / "zero").is_dir()
    resumed = _train(pair, output=tmp_path / "killed", **shared)
    assert (tmp_path / "whole" / "checkpoint" / "step_00000008" / "model.safetensors").is_file()
    drop = ("train_seconds", "output", "decode_seconds_per_clip", "before")
    assert {k: v for k, v in report.items() if k not in drop} == {k: v for k, v in resumed.items() if k not in drop}
    for line in _steps(tmp_path / "killed"):
        expected = next(s for s in _steps(tmp_path / "whole") if s["step"] == line["step"])
        assert {k: v for k, v in line.items() if k != "step_seconds"} == {
            k: v for k, v in expected.items() if k != "step_seconds"
        }
    assert load_vae(tmp_path / "killed").config.latent_channels == 2
