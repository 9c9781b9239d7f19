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
from training.alignment import reward, reward_fit
from training.alignment.calibration import calibration, draw_reliability
from training.alignment.reward_data import PairFolder, PairReader, Row, Split, open_pairs, split
from training.alignment.reward_fit import FitOptions, Judged, fit
from training.alignment.reward_model import CONFIG_FILE, WEIGHTS_FILE, RewardModel, RewardModelConfig, load_reward_model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pairs(tmp_path_factory.mktemp("pairs"), {"17x48x48": 40, "17x48x64": 24})


def trained(out: Path, *options: str) -> dict[str, Any]:
    reward.main(["--out", str(out), "--epochs", "6", "--held-out", "0.3", *options])
    assert (out / reward.PLOT_FILE).stat().st_size > 5_000
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


def test_what_is_read_again_gives_the_same_model(pairs: Path, tmp_path: Path) -> None:
    """Pairs that do not fit into --memory are read whenever they are needed; nothing else changes."""
    records = [trained(tmp_path / memory, "--pairs", str(pairs), "--memory", memory) for memory in ("0", "1e-5", "1")]
    assert records[0]["epochs"] == records[1]["epochs"] == records[2]["epochs"]
    folders = [PairFolder(open_pairs(pairs), 1.0)]
    rows = [row for rows in split(folders, 0.3).train for row in rows]
    for budget in (0, 10_000, 10**9):
        reader = PairReader(folders, True, budget)
        for _ in range(2):
            for row in rows:
                reader.read([row])
        assert reader.bytes_kept <= budget
        assert (reader.bytes_kept == 0) == (budget == 0)
    # Winner and loser of every pair in bf16, and the means of the text.
    sample = folders[0].dataset[rows[0].number]
    assert reader.bytes_kept > len(rows) * 2 * sample.moments.nbytes


def test_fresh_pairs_old_pairs_and_their_weights(pairs: Path, tmp_path: Path) -> None:
    """Fresh pairs whose labels are the reverse: what was learnt is forgotten, less so where old pairs are mixed in."""
    first = tmp_path / "first"
    trained(first, "--pairs", str(pairs))
    fresh = write_tiny_pairs(tmp_path / "fresh", {"17x48x48": 40}, seed=7, reverse=True)
    init = ["--init", str(first), "--patience", "6"]
    alone = trained(tmp_path / "alone", "--pairs", str(fresh), *init)
    # Without being asked: the folder that --init was trained on is judged, and not trained on.
    tuned, checked = alone["folders"]
    assert (checked["pairs"], checked["weight"], checked["training_pairs"]) == (str(pairs), 0, 0)
    assert checked["before"]["accuracy"] > 0.9
    assert checked["held_out"]["accuracy"] < 0.5 < tuned["held_out"]["accuracy"]
    assert alone["training_pairs"] == tuned["training_pairs"]
    unchecked = trained(tmp_path / "unchecked", "--pairs", str(fresh), *init, "--check")
    assert len(unchecked["folders"]) == 1
    mixed = trained(tmp_path / "mixed", "--pairs", f"{fresh}=0.05", str(pairs), *init)
    assert [folder["weight"] for folder in mixed["folders"]] == [0.05, 1]
    assert mixed["folders"][1]["held_out"]["accuracy"] > 0.9


def test_weights_are_those_of_the_loss(pairs: Path, tmp_path: Path) -> None:
    """A folder of weight 2 counts as one that is there twice."""
    other = write_tiny_pairs(tmp_path / "other", {"17x48x48": 20}, seed=3, reverse=True)
    opened = [open_pairs(pairs), open_pairs(other)]
    rows, margins = [Row(0, 0), Row(1, 0), Row(1, 1)], torch.tensor([0.3, -1.0, 2.0])
    each = -torch.nn.functional.logsigmoid(margins)
    assert Judged(rows, margins).loss([2.0, 1.0]) == pytest.approx(float((2 * each[0] + each[1] + each[2]) / 4))
    moved = []
    for folders in (
        [PairFolder(opened[0], 2.0), PairFolder(opened[1], 1.0)],
        [PairFolder(opened[0], 1.0)] * 2 + [PairFolder(opened[1], 1.0)],
    ):
        torch.manual_seed(0)
        model = RewardModel(RewardModelConfig(4, 16, 8, "v", "t"))
        groups = [[Row(number, row) for number in range(len(folders)) for row in range(4)]]
        # One batch of all, so that every step is the same mean.
        fit(model, PairReader(folders, True, 0), Split(groups, groups), FitOptions(epochs=2, batch_size=99))
        moved.append(model.state_dict())
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value, msg=name, atol=1e-4, rtol=1e-3)


def test_it_ends_when_nothing_is_gained(tmp_path: Path) -> None:
    equal = write_tiny_pairs(tmp_path / "equal", {"17x48x48": 30}, equal=True)
    record = trained(tmp_path / "model", "--pairs", str(equal), "--epochs", "40", "--patience", "2")
    assert (record["best_epoch"], len(record["epochs"])) == (0, 2)


def test_a_training_that_is_killed_goes_on(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after its third epoch, it gives the model of one that was not, bit for bit."""
    given, out = ["--pairs", str(pairs)], tmp_path / "killed"
    trained(tmp_path / "whole", *given)
    whole_epoch = reward_fit._train_epoch

    def end_in_the_fourth(*arguments: Any) -> None:
        if arguments[-1] == 4:
            raise KeyboardInterrupt
        whole_epoch(*arguments)

    monkeypatch.setattr(reward_fit, "_train_epoch", end_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        trained(out, *given)
    assert sorted(path.name for path in out.iterdir()) == [reward.PROGRESS_FILE]
    epochs = []
    monkeypatch.setattr(reward_fit, "_train_epoch", lambda *a: (epochs.append(a[-1]), whole_epoch(*a)))
    with pytest.raises(UserError, match="seed: 0 there, 5 now"):
        trained(out, *given, "--seed", "5")
    again = trained(out, *given)
    assert epochs == [4, 5, 6]
    assert again == json.loads((tmp_path / "whole" / CONFIG_FILE).read_text())["trained"]
    assert (out / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    assert not (out / reward.PROGRESS_FILE).exists()


def test_calibration_is_told_from_a_known_truth(tmp_path: Path) -> None:
    """Labels drawn with the probability that a margin claims are calibrated; margins three times as large are not."""
    generator = torch.Generator().manual_seed(0)
    strength = 1.5 * torch.randn(20_000, generator=generator)
    margins = torch.where(torch.rand(20_000, generator=generator) < torch.sigmoid(strength), strength, -strength)
    assert calibration(margins).expected_error < 0.01
    assert calibration(3 * margins).expected_error > 0.08
    # Two sure and one wrong, one unsure and right: bins of their own.
    found = calibration(torch.tensor([4.0, -4.0, 0.1]))
    sure, unsure = torch.sigmoid(torch.tensor([4.0, 0.1])).tolist()
    assert found.expected_error == pytest.approx((2 * abs(sure - 0.5) + abs(unsure - 1)) / 3)
    draw_reliability(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


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
    model = ["--pairs", str(pairs), "--init", str(tmp_path / "model")]
    with pytest.raises(UserError, match=r"--held-out 0.5: the model .* held out 0.3"):
        trained(tmp_path / "other", *model, "--held-out", "0.5")
    with pytest.raises(UserError, match="a folder is named twice"):
        trained(tmp_path / "other", "--pairs", str(pairs), f"{pairs}=2")
    for weight in ("0", "-1", "nan", "much"):
        with pytest.raises(UserError, match=f"'{weight}' is no weight"):
            trained(tmp_path / "other", "--pairs", f"{pairs}={weight}")
    values = json.loads((tmp_path / "model" / CONFIG_FILE).read_text())
    values["config"]["vae_fingerprint"] = "another"
    (tmp_path / "model" / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"was trained with the Video-VAE another; .* {PAIRS_INFO.vae_fingerprint}"):
        trained(tmp_path / "other", "--pairs", str(pairs), "--init", str(tmp_path / "model"))
    (tmp_path / "model" / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        load_reward_model(tmp_path / "model")
