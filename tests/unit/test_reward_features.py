"""Features of the DiT for reward models: what they are, how a pass goes on, and that only the right ones are used."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_features import tiny_pairs, tiny_run
from tiny_pairs import write_tiny_pairs
from tiny_samples import make_samples

from megatron_video.dit import build_dit
from megatron_video.errors import UserError
from megatron_video.flow_matching import interpolate
from megatron_video.noise import NoiseSource
from megatron_video.parallel import one_process
from training.alignment import command, features, pair, reward, score
from training.alignment.feature_files import FeatureFiles
from training.alignment.feature_latents import open_latents
from training.alignment.feature_pass import _number_of
from training.alignment.reward_model import CONFIG_FILE, load_reward_model
from training.checkpoint import find_checkpoint, load_model_weights, read_model_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pairs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with features after both layers."""
    folder = tiny_pairs(tmp_path_factory.mktemp("data"))
    compute(run, folder, "--layer", "0", "1", "--t", "0.3", "0.9")
    return folder


def compute(run: Path, data: Path, *options: str) -> FeatureFiles:
    features.main(["--checkpoint", str(run), "--data", str(data), "--batch-size", "8", *options])
    folders = list((data / "features").iterdir()) if "--out" not in options else [Path(options[-1])]
    return FeatureFiles.open(folders[0])


def test_features_are_statistics_of_the_hidden_states_of_the_whole_model(run: Path, pairs: Path) -> None:
    """Against the model run plainly, all its layers in place, and pooled from the whole sequence."""
    files = FeatureFiles.open(next((pairs / "features").iterdir()))
    item = open_latents(pairs)[3]
    noise = NoiseSource(0, "features").noise(0, _number_of(item.prompt), item.latent.shape)
    hidden: dict[str, torch.Tensor] = {}
    with one_process() as parallel, torch.no_grad():
        checkpoint = find_checkpoint(run)
        sizes = read_model_config(checkpoint)
        (model,) = build_dit(sizes, parallel, torch.float32, device=torch.device("cpu"), init_seed=None)
        load_model_weights(checkpoint, [model])
        model.eval()
        model.activation_watch = lambda name, x, tokens: hidden.update({name: x[:, 0].clone()})
        noised = interpolate(noise[None], item.latent[None].float(), torch.tensor([0.9]))
        model(noised, torch.tensor([0.9]), item.llm[None], item.clip[None])
    found = files.read([3])
    for layer in (0, 1):
        tokens = hidden[f"layers.{layer}"]
        frames = tokens.view(item.latent.shape[0], -1, tokens.shape[-1])
        torch.testing.assert_close(found.features[0, 1, layer, 0], tokens.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.features[0, 1, layer, 1], tokens.std(0, correction=0), atol=1e-5, rtol=1e-4)
        change = (frames[1:] - frames[:-1]).square().mean((0, 1)).sqrt()
        torch.testing.assert_close(found.features[0, 1, layer, 2], change, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.llm[0], item.llm.float().mean(0))


def test_the_noise_is_the_prompts(run: Path, tmp_path: Path) -> None:
    """Equal latents of a pair have equal features, and a sample has the same in its folder and in a pair."""
    equal = compute(
        run, write_tiny_pairs(tmp_path / "equal", {"17x48x48": 2}, equal=True), "--layer", "1", "--t", "0.2"
    )
    winner, loser, other, _ = equal.read(range(4)).features
    torch.testing.assert_close(winner, loser)
    assert not torch.allclose(winner, other, atol=1e-2)
    samples = make_samples(tmp_path / "samples", {"one": [0.2, 0.9], "two": [0.7, 0.1]})
    score.main(["--samples", str(samples), "--with", "brightness"])
    pair.main(["--samples", str(samples), "--out", str(tmp_path / "made")])
    alone = compute(run, samples, "--layer", "1", "--t", "0.2").read([1, 0])
    member = open_latents(tmp_path / "made")[0]
    paired = compute(run, tmp_path / "made", "--layer", "1", "--t", "0.2").read(
        [0, 1] if member.prompt == "one" else [2, 3]
    )
    torch.testing.assert_close(paired.features, alone.features)


def test_a_pass_goes_on_where_it_was_ended(run: Path, pairs: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    options = ["--layer", "1", "--t", "0.5", "--json", "--out", str(out)]
    before = compute(run, pairs, *options).read(range(68))
    blocks = sorted(out.glob("*.safetensors"))
    untouched, lost = blocks[0].stat().st_mtime_ns, blocks[1]
    lost.unlink()
    capsys.readouterr()
    again = compute(run, pairs, *options).read(range(68))
    assert json.loads(capsys.readouterr().out)["made"] == 4
    assert blocks[0].stat().st_mtime_ns == untouched
    torch.testing.assert_close(again.features, before.features, atol=0, rtol=0)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "2", "--t", "0.5"], "--layer 2: the model has the layers 0 to 1"),
        (["--layer", "1", "--t", "1"], r"--t 1.0 must lie in \[0, 1\)"),
        (["--layer", "1", "--t", "0.5", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--layer", "1", "--t", "0.5", "--tensor-parallel-size", "3"], "tensor_model_parallel_size=3"),
    ],
)
def test_what_cannot_work_is_refused(run: Path, pairs: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute(run, pairs, *options)


def test_features_of_something_else_are_refused_by_name(run: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--layer", "1", "--t", "0.5", "--out", str(out)]
    compute(run, pairs, *given)
    with pytest.raises(UserError, match=r"layers: \[1\] and \[0\]; times: \[0.5\] and \[0.7\]; seed: 0 and 4\)"):
        features.main(["--checkpoint", str(run), "--data", str(pairs), "--layer", "0", "--t", "0.7", "--seed", "4",
                       "--out", str(out)])  # fmt: skip
    with pytest.raises(UserError, match="data: "):
        compute(run, tiny_pairs(tmp_path, "others", seed=3), *given)
    with pytest.raises(UserError, match='checkpoint: "step_00000007'):
        compute(tiny_run(tmp_path / "other", seed=5), pairs, *given)
    with pytest.raises(UserError, match="neither pairs"):
        compute(run, tmp_path, "--layer", "1", "--t", "0.5")


def test_a_model_on_features_is_trained_and_scores(run: Path, pairs: Path, tmp_path: Path) -> None:
    stored = next((pairs / "features").iterdir())
    given = ["--pairs", str(pairs), "--features", str(stored), "--held-out", "0.3", "--learning-rate", "0.01"]
    given += ["--epochs", "12"]
    reward.main([*given, "--out", str(tmp_path / "model")])
    config = json.loads((tmp_path / "model" / CONFIG_FILE).read_text())
    assert config["config"]["features"]["layers"] == [0, 1]
    assert config["trained"]["held_out"]["accuracy"] > 0.8
    reward.main([*given, "--with-latents", "--out", str(tmp_path / "both")])
    samples = make_samples(tmp_path / "samples", {"one": [0.2, 0.9], "two": [0.7, 0.1]})
    settings = json.loads((samples / "settings.json").read_text())
    settings["settings"] |= {"vae": "vae", "text": "text"}
    (samples / "settings.json").write_text(json.dumps(settings))
    scoring = ["--samples", str(samples), "--with", f"reward:{tmp_path / 'model'}"]
    with pytest.raises(UserError, match="there are no features of these latents") as refusal:
        score.main(scoring)
    words = shlex.split(str(refusal.value).partition("make them: ")[2])
    assert words[:2] == ["megatron-video", "dpo"]
    command.main(words[2:])
    assert score.main(scoring) == 0
    assert rewards(samples / "scores.jsonl") == pytest.approx(by_hand(tmp_path / "model", samples), rel=1e-4)
    both = tmp_path / "both.jsonl"
    score.main(["--samples", str(samples), "--with", f"reward:{tmp_path / 'both'}", "--out", str(both)])
    assert rewards(both) == pytest.approx(by_hand(tmp_path / "both", samples), rel=1e-4)


def rewards(path: Path) -> list[float]:
    found = [json.loads(line)["score"] for line in path.read_text().splitlines()]
    assert len(set(found)) == 4
    return found


def by_hand(model: Path, samples: Path) -> list[float]:
    """All samples at once, from their latents and features."""
    reward_model, files = load_reward_model(model), FeatureFiles.open(next((samples / "features").iterdir()))
    found, latents = files.read(range(4)), [open_latents(samples)[number].latent.float() for number in range(4)]
    seen = torch.stack(latents) if reward_model.config.latents else None
    with torch.no_grad():
        return list(reward_model(seen, found.llm, found.clip, found.features.flatten(1)).tolist())


def test_a_reward_model_takes_its_own_features_only(run: Path, pairs: Path, tmp_path: Path) -> None:
    stored = next((pairs / "features").iterdir())
    given = ["--pairs", str(pairs), "--held-out", "0.3", "--epochs", "1"]
    reward.main([*given, "--features", str(stored), "--out", str(tmp_path / "model")])
    others = compute(run, pairs, "--layer", "1", "--t", "0.9", "--out", str(tmp_path / "others"))
    init = ["--init", str(tmp_path / "model")]
    with pytest.raises(UserError, match=r"layers: \[1\] and \[0, 1\]; times: \[0.9\] and \[0.3, 0.9\]"):
        reward.main([*given, *init, "--features", str(others.folder), "--out", str(tmp_path / "x")])
    fresh = tiny_pairs(tmp_path, "fresh", seed=9)
    with pytest.raises(UserError, match=r"there are no features of these latents in .*fresh/features/"):
        reward.main(["--pairs", str(fresh), "--held-out", "0.3", *init, "--out", str(tmp_path / "x")])
    moved = tmp_path / "moved"
    shutil.copytree(stored, moved)
    next(moved.glob("latents-00000064*")).unlink()
    with pytest.raises(UserError, match=r"1 blocks are missing; go on with: megatron-video dpo features"):
        reward.main([*given, "--features", str(moved), "--out", str(tmp_path / "x")])
    reward.main([*given, "--out", str(tmp_path / "latents")])
    with pytest.raises(UserError, match="sees latents alone"):
        reward.main(
            [*given, "--features", str(stored), "--init", str(tmp_path / "latents"), "--out", str(tmp_path / "x")]
        )
    with pytest.raises(UserError, match="--with-latents is for models that see --features"):
        reward.main([*given, "--with-latents", "--out", str(tmp_path / "x")])
