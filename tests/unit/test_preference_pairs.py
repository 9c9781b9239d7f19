"""From scored samples to preference shards: what is paired, what is left out and why, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_samples import make_samples
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LLM_DIM

from megatron_video.errors import UserError
from megatron_video.shards import ShardDataset
from megatron_video.text import TextStates
from training.alignment import pair, score
from training.alignment.scorers import SCORERS
from training.sample_latents import latent_file, read_latent, write_latent


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_samples(
        tmp_path_factory.mktemp("generated") / "samples",
        {"four": [0.2, 0.9, 0.5, 0.4], "tied": [0.5, 0.5], "alone": [0.7], "two": [0.1, 0.3]},
    )
    assert score.main(["--samples", str(folder), "--with", "brightness"]) == 0
    return folder


def paired(samples: Path, out: Path, *options: str) -> dict[str, object]:
    pair.main(["--samples", str(samples), "--out", str(out), "--json", *options])
    report: dict[str, object] = json.loads((out / pair.REPORT_FILE).read_text())
    return report


def test_the_best_against_the_worst_of_every_prompt(samples: Path, tmp_path: Path) -> None:
    report = paired(samples, tmp_path / "pairs", "--pairs-per-prompt", "2", "--margin", "0.15")
    assert report["left_out"] == {"tie": 2, "one video of its prompt": 1}
    assert (report["pairs"], report["prompts_with_pairs"]) == (2, 2)
    dataset = ShardDataset(tmp_path / "pairs")
    assert dataset.rows.info.pairs
    found = {sample.metadata["caption"]: sample for sample in (dataset[0], dataset[1])}
    four = found["four"]
    assert (four.metadata["winner_seed"], four.metadata["loser_seed"]) == (1, 0)
    assert four.metadata["margin"] == pytest.approx(0.7, abs=0.01)
    assert torch.equal(four.moments, read_latent(latent_file(samples, 1)).latent)
    assert four.loser is not None
    assert torch.equal(four.loser, read_latent(latent_file(samples, 0)).latent)
    assert (tmp_path / "pairs" / "pairs.png").stat().st_size > 10_000


def test_near_duplicates_are_left_out(samples: Path, tmp_path: Path) -> None:
    # Independent normal latents differ by the root of two standard deviations.
    report = paired(samples, tmp_path / "close", "--least-difference", "1.2")
    assert report["pairs"] == 2
    with pytest.raises(UserError, match=r"no pair is left \(2 near-duplicates"):
        paired(samples, tmp_path / "far", "--least-difference", "1.7")


def test_labels_are_flipped_on_purpose_alone(samples: Path, tmp_path: Path) -> None:
    paired(samples, tmp_path / "right")
    report = paired(samples, tmp_path / "wrong", "--flip-labels", "1")
    assert report["flipped"] == 2
    for number in range(2):
        right, wrong = ShardDataset(tmp_path / "right")[number], ShardDataset(tmp_path / "wrong")[number]
        assert right.loser is not None
        assert torch.equal(right.loser, wrong.moments)


def test_an_interrupted_scoring_goes_on(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (samples / "scores.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "scores.jsonl"
    out.write_text("".join(whole[:3]) + whole[3][:20])
    capsys.readouterr()
    score.main(["--samples", str(samples), "--with", "brightness", "--out", str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["scored_now"] == len(whole) - 3
    assert out.read_text() == "".join(whole)


def test_weighted_rewards_and_a_users_own(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def length(sample):\n    return len(sample.prompt)\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "both.jsonl"
    score.main(
        ["--samples", str(samples), "--with", "brightness=2", "--with", "my_rewards:length=-1", "--out", str(out)]
    )
    first = json.loads(out.read_text().splitlines()[0])
    assert first["scores"]["my_rewards:length"] == 4
    assert first["score"] == pytest.approx(2 * first["scores"]["brightness"] - 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--with", "niceness"], "known are shape_motion"),
        (["--with", "nowhere:reward"], "cannot be imported"),
        (["--with", "brightness=much"], "'much' is not a weight"),
        (["--with", "reward:nowhere"], "no reward_model.json there"),
        (["--with", "math:pi"], "is not a function"),
    ],
)
def test_scorers_that_are_none(options: list[str], said: str, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        score.main(["--samples", str(samples), "--out", str(tmp_path / "s.jsonl"), *options])


def test_processes_give_the_scores_of_one(samples: Path, tmp_path: Path) -> None:
    given = ["--samples", str(samples), "--with", "brightness", "--with", "shape_as_asked=0.5"]
    for workers in ("1", "2"):
        assert score.main([*given, "--workers", workers, "--out", str(tmp_path / workers)]) == 0
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()
    with pytest.raises(UserError, match="--workers 0 must be at least 1"):
        score.main([*given, "--workers", "0", "--out", str(tmp_path / "0")])


def test_a_score_that_is_not_finite_is_refused(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "broken", lambda sample: float("nan"))
    with pytest.raises(UserError, match=r"broken gives .*00000.mp4 the score nan"):
        score.main(["--samples", str(samples), "--with", "broken", "--out", str(tmp_path / "s.jsonl")])


def test_scores_of_other_samples_or_scorers_are_not_mixed(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds scores by"):
        score.main(["--samples", str(samples), "--with", "shape_motion"])
    other = make_samples(tmp_path / "other", {"else": [0.1, 0.9]})
    (other / "scores.jsonl").write_text((samples / "scores.jsonl").read_text())
    with pytest.raises(UserError, match="holds scores of other samples"):
        score.main(["--samples", str(other), "--with", "brightness"])


def test_members_of_another_shape_are_refused(samples: Path, tmp_path: Path) -> None:
    other = make_samples(tmp_path / "other", {"shapes": [0.1, 0.9]})
    score.main(["--samples", str(other), "--with", "brightness"])
    text = TextStates(torch.randn(5, LLM_DIM), torch.randn(CLIP_SLOTS, CLIP_DIM), 5, 5)
    write_latent(latent_file(other, 1), torch.randn(3, 4, 3, 4), text)
    with pytest.raises(UserError, match="the members of a pair differ in shape"):
        paired(other, tmp_path / "out")


def test_what_is_missing_is_named(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`megatron-video dpo generate`"):
        paired(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="`megatron-video dpo score` writes it"):
        paired(samples, tmp_path / "out", "--scores", str(tmp_path / "none.jsonl"))
    other = make_samples(tmp_path / "other", {"few": [0.1, 0.9]})
    score.main(["--samples", str(other), "--with", "brightness"])
    latent_file(other, 0).unlink()
    with pytest.raises(UserError, match="generate with --latents"):
        paired(other, tmp_path / "out")
