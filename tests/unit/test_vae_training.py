"""Training of the Video-VAE: it learns, a stopped run continues bit for bit, batches and refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vae_clips_on_disk import vae_config, write_clips

from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.run_lock import run_lock
from megatron_video.vae import load_vae
from training import train_vae, vae_run
from training.vae_clips import TrainingClips
from training.vae_config import PRESET_DIR, VAETrainConfig
from training.vae_report import kl_divergence


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_stopped_run_continues_bit_for_bit(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    report = train_vae.train(vae_config(manifest, whole))
    original = vae_run.VAERun.train_step

    def interrupted_at_three(run: vae_run.VAERun, pixels: torch.Tensor) -> dict[str, float]:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, pixels)

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(vae_run.VAERun, "train_step", interrupted_at_three)
    with pytest.raises(KeyboardInterrupt):
        train_vae.train(vae_config(manifest, stopped))
    assert [line["step"] for line in _steps(stopped)] == [1, 2, 3]
    assert not (stopped / "model.safetensors").exists()
    monkeypatch.undo()
    # Decoding on the fly instead of from memory must not change what is learned.
    train_vae.train(vae_config(manifest, stopped, cache_gib=0.0))
    names = ("step", "loss", "l1", "kl", "grad_norm", "learning_rate")
    assert [[s[n] for n in names] for s in _steps(whole)] == [[s[n] for n in names] for s in _steps(stopped)]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)
    _check_outputs(whole, report)
    # A third start does nothing but tell.
    capsys.readouterr()
    assert train_vae.train(vae_config(manifest, whole)) == json.loads((whole / "report.json").read_text())
    assert "trained already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings \(learning_rate: 0.001 there, 0.002 now\)"):
        train_vae.train(vae_config(manifest, whole, learning_rate=2e-3))


def _check_outputs(folder: Path, report: dict[str, Any]) -> None:
    for name in ("config.json", "reconstructions.png", "train_config.yaml", "tensorboard"):
        assert (folder / name).exists()
    assert report["steps"] == 6
    assert math.isfinite(report["psnr"])
    assert load_vae(folder).decode(torch.zeros(1, 3, 2, 1, 1)).shape == (1, 17, 3, 16, 16)


def test_the_loss_falls(manifest: Path, tmp_path: Path) -> None:
    stages = [{"steps": 25, "frames": 1, "crop": 16, "batch_size": 4}]
    train_vae.train(vae_config(manifest, tmp_path, stages=stages, mse_weight=2.0, precision="fp32"))
    losses = [step["loss"] for step in _steps(tmp_path)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_kl_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 2, 3, 4, 2, 2, generator=generator)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(torch.cat([mean, logvar], dim=2)), expected)


def test_batches_follow_stage_and_step_and_leave_held_out_clips_alone(manifest: Path, tmp_path: Path) -> None:
    config = vae_config(manifest, tmp_path)
    clips = TrainingClips(config)
    shapes = [tuple(clips.batch(step).shape) for step in range(config.total_steps)]
    assert set(shapes[:3]) == {(2, 1, 3, 16, 16)}
    assert set(shapes[3:]) <= {(1, 9, 3, 16, 16), (2, 1, 3, 16, 16)}
    assert torch.equal(clips.batch(4), TrainingClips(config).batch(4))
    ((bucket, held_out),) = clips.held_out.items()
    training = {clip.row["clip_id"] for clip in clips.training[bucket]}
    assert {clip.row["clip_id"] for clip in held_out} | training == {f"clip{number}" for number in range(4)}
    assert len(held_out) == 1
    assert len(training) == 3
    clips.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"steps": 1, "frames": 6}]}, "6 frames cannot be encoded"),
        ({"stages": [{"steps": 1, "frames": 34}]}, "frames=34, more than bucket 17x32x32"),
        ({"stages": [{"steps": 1, "frames": 1, "crop": 48}]}, "crop=48 of a stage is larger than bucket"),
        ({"buckets": ["17x30x32"]}, "30"),
        ({"learnig_rate": 1.0}, "did you mean 'learning_rate'"),
        ({"learning_rate": -1.0}, r"learning_rate=-1.0 must be above 0"),
        ({"learning_rate": 1e-9}, r"min_learning_rate=.* is above learning_rate=1e-09"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must not be negative"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
        ({"betas": [0.9, 1.0]}, "betas=.* must lie in"),
        ({"adversarial": {"weight": -1.0}}, "adversarial.weight=-1 must not be negative"),
        ({"perceptual": {"weight": -1.0}}, "perceptual.weight=-1 must not be negative"),
    ],
)
def test_impossible_configurations_are_refused(manifest: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vae_config(manifest, Path("unused"), **changes)


def test_unusable_data_is_refused(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kept clip fits a bucket of 34x32x32"):
        train_vae.train(vae_config(manifest, tmp_path, buckets=["34x32x32"]))
    with pytest.raises(UserError, match="no such manifest"):
        train_vae.train(vae_config(tmp_path / "m.parquet", tmp_path))
    (tmp_path / "checkpoint.json").write_bytes(b"half a file")
    with pytest.raises(UserError, match="names no readable checkpoint"):
        train_vae.train(vae_config(manifest, tmp_path))


def test_two_runs_on_one_output_are_refused(manifest: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path / ".run.lock", tmp_path), pytest.raises(UserError, match="another run is writing there"):
        train_vae.train(vae_config(manifest, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_video_vae_of_another_origin_is_not_overwritten(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"released")
    with pytest.raises(UserError, match="holds a Video-VAE that was not trained there"):
        train_vae.train(vae_config(manifest, tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == b"released"


def test_a_gradient_that_is_not_finite_ends_the_run(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step [0-9] gave .*lower learning_rate=1e\+30; no checkpoint had"):
        train_vae.train(vae_config(manifest, tmp_path, learning_rate=1e30, evaluate_first=False))


@pytest.mark.parametrize("preset", ["vae_demo", "vae_paper"])
def test_the_presets_are_valid(preset: str) -> None:
    config = load_config(VAETrainConfig, preset, ["manifest=m.parquet", "output=out"], PRESET_DIR)
    assert config.total_steps == sum(stage.steps for stage in config.stages)
    assert config.learning_rate_at(config.warmup_steps - 1) == config.learning_rate
    assert config.learning_rate_at(config.total_steps - 1) == pytest.approx(config.min_learning_rate)
