"""A reward model learns what pairs were made by, is validated on prompts it never saw, and knows its encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pairs import PAIRS_INFO, write_tiny_pairs
from tiny_shards import write_tiny_shards

from megatron_video.errors import UserError
from training.alignment import reward
from training.alignment.reward_model import CONFIG_FILE, WEIGHTS_FILE, RewardModel, RewardModelConfig, load_reward_model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pairs(tmp_path_factory.mktemp("pairs"), {"17x48x48": 40, "17x48x64": 24})


def trained(out: Path, *options: str) -> dict[str, Any]:
    reward.main(["--out", str(out), "--epochs", "6", "--held-out", "0.3", *options])
    record: dict[str, Any] = json.loads((out / CONFIG_FILE).read_text())["trained"]
    return record


def test_it_learns_what_the_pairs_were_made_by(pairs: Path, tmp_path: Path) -> None:
    record = trained(tmp_path / "model", "--pairs", str(pairs))
    assert record["held_out"]["accuracy"] > 0.9
    assert record["held_out"]["pairs"] + record["training_pairs"] == 64
    assert record["held_out"]["loss"] < record["before"]["loss"]
    again = trained(tmp_path / "again", "--pairs", str(pairs))
    assert again["held_out"] == record["held_out"]
    further = trained(tmp_path / "further", "--pairs", str(pairs), "--init", str(tmp_path / "model"))
    assert further["before"]["loss"] == pytest.approx(record["held_out"]["loss"])


def test_labels_without_sense_are_not_learnt(tmp_path: Path) -> None:
    """Held-out accuracy of pairs whose members are alike must be that of a coin."""
    equal = write_tiny_pairs(tmp_path / "equal", {"17x48x48": 40}, equal=True)
    record = trained(tmp_path / "model", "--pairs", str(equal))
    assert record["held_out"]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_rewards_are_of_every_sample_alone() -> None:
    config = RewardModelConfig(4, 16, 8, "v", "t")
    model = RewardModel(config).eval()
    latents, llm, clip = torch.randn(3, 3, 4, 3, 5), torch.randn(3, 16), torch.randn(3, 8)
    alone = torch.cat([model(latents[n : n + 1], llm[n : n + 1], clip[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(model(latents, llm, clip), alone)


def test_what_is_refused(pairs: Path, tmp_path: Path) -> None:
    trained(tmp_path / "model", "--pairs", str(pairs))
    with pytest.raises(UserError, match="holds a reward model"):
        trained(tmp_path / "model", "--pairs", str(pairs))
    with pytest.raises(UserError, match="holds single samples"):
        trained(tmp_path / "other", "--pairs", str(write_tiny_shards(tmp_path / "shards", {"17x48x48": 2})))
    few = write_tiny_pairs(tmp_path / "few", {"17x48x48": 1})
    with pytest.raises(UserError, match="leaves no prompt on one side"):
        trained(tmp_path / "other", "--pairs", str(few))
    values = json.loads((tmp_path / "model" / CONFIG_FILE).read_text())
    values["config"]["vae_fingerprint"] = "another"
    (tmp_path / "model" / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"was trained with the Video-VAE another; .* {PAIRS_INFO.vae_fingerprint}"):
        trained(tmp_path / "other", "--pairs", str(pairs), "--init", str(tmp_path / "model"))
    (tmp_path / "model" / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        load_reward_model(tmp_path / "model")
