"""The 4x8x8 VAE of the base stages, how the whole one grows out of it, and what each phase trains."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from vae_clips_on_disk import MODEL, vae_config, write_clips

from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from megatron_video.vae import VAEConfig, VideoVAE, load_vae
from megatron_video.vae.base import BaseVideoVAE, latent_shape, load_base, part_of, save_base
from megatron_video.vae.initialisation import initialise
from training import train_vae, vae_run
from training.vae_config import VAETrainConfig
from training.vae_phases import freeze, next_model
from training.vae_ranks import Ranks
from training.vae_updater import build_updater

BASE = {"steps": 2, "frames": 1, "crop": 16, "batch_size": 2, "kind": "base"}
MODULES = [{**BASE, "kind": "dual_path", "trains": trains} for trains in ("dual_path", "middle", "all")]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def _config(**changes: Any) -> VAETrainConfig:
    return vae_config(Path("m.parquet"), Path("out"), **changes)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (9, 3), (17, 5), (26, 8), (34, 10)])
def test_the_base_codes_4x8x8(frames: int, latents: int) -> None:
    base = BaseVideoVAE(build_config(VAEConfig, MODEL, "test"), latent_channels=3)
    initialise(base, 0)
    with torch.no_grad():
        moments = base.encode_moments(torch.zeros(1, frames, 3, 16, 32))
        assert moments.shape == (1, latents, 6, 2, 4)
        assert base.decode(moments[:, :, :3]).shape == (1, frames, 3, 16, 32)
    assert latent_shape(base, (1, frames, 3, 16, 32)) == (1, latents, 3, 2, 4)
    # The posterior starts narrow in every channel.
    assert base.encoder.conv_out.conv.bias.tolist() == [0, 0, 0, -6, -6, -6]


@pytest.mark.parametrize("frames", [1, 9, 17, 26])
def test_shape_of_latents_is_what_the_whole_vae_gives(frames: int) -> None:
    vae = VideoVAE(build_config(VAEConfig, MODEL, "test"))
    B, t, z, h, w = latent_shape(vae, (1, frames, 3, 32, 16))
    with torch.no_grad():
        assert vae.encode_moments(torch.zeros(1, frames, 3, 32, 16)).shape == (B, t, 2 * z, h, w)


def test_the_whole_vae_takes_all_but_the_dual_path_from_the_base(tmp_path: Path) -> None:
    config = _config()
    base = BaseVideoVAE(config.model, config.base_latent_channels)
    initialise(base, 5)
    fresh = VideoVAE(config.model)
    initialise(fresh, config.seed)
    save_base(base, tmp_path)
    weights = load_base(tmp_path).state_dict()
    grown = next_model(config, "dual_path", "base", weights).state_dict()
    for name, weight in grown.items():
        source = fresh.state_dict() if part_of(name) == "dual_path" else weights
        assert torch.equal(weight, source[name]), name
    with pytest.raises(UserError, match="holds no base VAE"):
        load_base(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_vae(tmp_path)


def test_each_phase_trains_its_parts_alone(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    original = vae_run.VAERun.train_step

    def noting(run: vae_run.VAERun, pixels: torch.Tensor) -> dict[str, float]:
        values = original(run, pixels)
        seen.append({name: weight.clone() for name, weight in run.vae.state_dict().items()})
        return values

    monkeypatch.setattr(vae_run.VAERun, "train_step", noting)
    config = vae_config(manifest, tmp_path, stages=[BASE, *MODULES], evaluate_first=False, precision="fp32")
    train_vae.train(config)
    trained = {2: {"dual_path"}, 4: {"dual_path", "middle"}, 6: {"dual_path", "middle", "backbone"}}
    for first, parts in trained.items():
        before, after = seen[first], seen[first + 1]
        assert {part_of(name) for name in after if not torch.equal(before[name], after[name])} == parts
    # What the base learned is where the whole VAE begins.
    assert all(torch.equal(seen[2][name], seen[1][name]) for name in seen[2] if part_of(name) == "backbone")
    parts = {part_of(name) for name in seen[-1]}
    assert parts == {"dual_path", "middle", "backbone"}


def test_a_run_of_base_stages_alone_is_what_another_starts_from(manifest: Path, tmp_path: Path) -> None:
    base, whole = tmp_path / "base", tmp_path / "whole"
    train_vae.train(vae_config(manifest, base, stages=[BASE], evaluate_first=False))
    shared = {"stages": [{**MODULES[0], "steps": 1}], "initial_weights": str(base), "evaluate_first": False}
    train_vae.train(vae_config(manifest, whole, **shared))
    grown, learned = load_vae(whole).state_dict(), load_base(base).state_dict()
    assert all(torch.equal(grown[name], learned[name]) for name in grown if part_of(name) != "dual_path")
    with pytest.raises(UserError, match="first stage of kind=base needs a base VAE"):
        train_vae.train(vae_config(manifest, tmp_path / "no", stages=[BASE], initial_weights=str(whole)))


def test_the_adversarial_loss_starts_when_the_last_phase_has_converged(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adversarial = {"weight": 1.0, "patience": 1, "min_gain": 100.0, "channels": 8, "num_layers": 1}
    stages = [BASE, {**BASE, "kind": "dual_path", "steps": 6}]
    report = train_vae.train(
        vae_config(manifest, tmp_path, stages=stages, adversarial=adversarial, evaluate_every=1, evaluate_first=False)
    )
    # Evaluations of the base, at steps 1 and 2, do not count; the one of step 4 is no 100 dB above that of step 3.
    assert report["adversarial_since"] == 4
    out = capsys.readouterr().out
    assert "step 4: held-out PSNR has converged, the adversarial loss starts" in out
    assert "perceptual loss: off" in out


def test_learning_rate_warms_up_in_each_phase() -> None:
    stages = [{**BASE, "steps": 10}, {**MODULES[0], "steps": 5}, {**MODULES[0], "steps": 5}]
    config = _config(stages=stages, warmup_steps=2, min_learning_rate=0.0)
    rates = [config.learning_rate_at(step) for step in range(20)]
    assert rates[0] == rates[1] / 2 == config.learning_rate / 2
    # Half of the cosine over steps 2 to 19, then all of it; the second size of that phase just goes on.
    cosine = [0.5 * config.learning_rate * (1 + math.cos(math.pi * (step - 2) / 17)) for step in range(2, 20)]
    assert rates[10] == pytest.approx(cosine[8] / 2)
    assert rates[11:] == pytest.approx(cosine[9:])


def test_freezing_is_undone_by_the_next_phase() -> None:
    vae = VideoVAE(_config().model)
    freeze(vae, "dual_path", "dual_path")
    assert {part_of(n) for n, p in vae.named_parameters() if p.requires_grad} == {"dual_path"}
    freeze(vae, "dual_path", "all")
    assert all(parameter.requires_grad for parameter in vae.parameters())


def test_several_ranks_without_deepspeed_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = _config()
    with pytest.raises(UserError, match=r"pip install 'megatron-video\[vae\]'"):
        build_updater(VideoVAE(config.model), config, Ranks(0, 2, torch.device("cpu")))


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    assert Ranks(1, 2, torch.device("cpu")).share(6) == slice(3, 6)
    with pytest.raises(UserError, match="a batch of 5 does not divide into 2 ranks"):
        Ranks(1, 2, torch.device("cpu")).share(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [MODULES[2], BASE]}, "base comes first"),
        ({"stages": [MODULES[2], MODULES[0]]}, "what was unfrozen stays so"),
        ({"stages": [{**BASE, "trains": "middle"}]}, "the base VAE is always trained as a whole"),
        ({"perceptual": {"weight": 1.0}}, "needs perceptual.vgg=None"),
        ({"adversarial": {"channels": 12}}, "multiple of 8"),
        ({"ema_decay": 0.9, "zero_stage": 3}, "ema_decay needs whole weights"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _config(**changes)
