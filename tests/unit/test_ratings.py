"""Ratings as input: what files may say, what they give as scores, pairs and a win rate, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from tiny_samples import make_samples

from megatron_video.errors import UserError
from megatron_video.files import file_sha256
from megatron_video.shards import ShardDataset
from training.alignment import pair, score, win_rate
from training.alignment.rating.votes import Vote, VoteFile, read_ratings

BRIGHTNESS = {"four": [0.2, 0.9, 0.5, 0.4], "two": [0.1, 0.3]}  # samples 0 to 3, and 4 and 5
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_samples(tmp_path_factory.mktemp("rated") / "before", BRIGHTNESS)


@pytest.fixture(scope="module")
def other_model(samples: Path) -> Path:
    return make_samples(
        samples.parent / "after", {name: [x + 0.05 for x in values] for name, values in BRIGHTNESS.items()}
    )


def line(rater: str, a: int, b: int, said: str, **more: object) -> dict[str, object]:
    return {"rater": rater, "index_a": a, "index_b": b, "vote": said, **more}


def written(path: Path, lines: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(values) + "\n" for values in lines))
    return path


def scored(samples: Path, ratings: Path, *options: str) -> dict[int, float]:
    out = ratings.with_name("scores.jsonl")
    score.main(["--samples", str(samples), "--with", f"ratings:{ratings}", "--out", str(out), *options])
    return score.read_scores(out)


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    lines = [line("ann", 0, 1, "b", left="a", seconds=2.5), line("bob", 2, 1, "tie")]
    table = tmp_path / "votes.csv"
    # As Excel writes it: a byte order mark, and cells that say nothing.
    table.write_text(
        "\ufeffrater,index_a,index_b,vote,left,seconds,comment\nann,0,1,b,a,2.5,nice\nbob,2,1,tie,,,\n",
        encoding="utf-8",
    )
    from_table = read_ratings([table]).votes
    from_lines = read_ratings([written(tmp_path / "votes.jsonl", lines)]).votes
    assert [vote.model_dump() for vote in from_table] == [vote.model_dump() for vote in from_lines]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.jsonl", '{"rater": "ann", "vote": "left"}\n', r"line 1: vote='left': .*'a', 'b', 'tie'"),
        ("r.jsonl", '{"vote": "a"}\n', "line 1: rater is missing"),
        ("r.jsonl", '{"rater": "ann", "index": 0, "ratng": 3}\n', "has the columns rater, index, ratng; give either"),
        ("r.jsonl", '{"rater": "a", "rating": 1, "vote": "a"}\n', "give either vote or rating"),
        ("r.jsonl", "[1]\n", "line 1 is no rating"),
        ("r.jsonl", 'x\n{"rater": "a", "rating": 1}\n', "line 1 is not JSON"),
        ("r.csv", "rater,index,rating\nann,0,good\n", "line 2: rating='good'"),
        ("r.csv", "rater,index,rating\nann,0,nan\n", "line 2: rating='nan': .*finite"),
        ("r.jsonl", "", "no rating there"),
        ("r.txt", "", "must be .jsonl or .csv"),
    ],
)
def test_lines_that_are_no_ratings(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_ratings([tmp_path / name])


def test_undo_takes_back_the_last_vote_on_that_showing_alone(tmp_path: Path) -> None:
    lines = [
        line("ann", 0, 1, "b"),
        line("ann", 0, 1, "a"),
        line("bob", 0, 1, "b"),
        line("ann", 0, 1, "tie", showing=2),
        line("ann", 1, 0, "undo"),
        line("ann", 2, 3, "undo"),
        line("ann", 0, 1, "skip"),
    ]
    votes = read_ratings([written(tmp_path / "r.jsonl", lines)]).votes
    assert [(vote.rater, vote.vote) for vote in votes] == [("ann", "b"), ("bob", "b"), ("ann", "tie"), ("ann", "skip")]


def test_a_torn_line_is_told_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "r.jsonl", [line("ann", 0, 1, "a")])
    whole = path.read_text()
    path.write_text(whole + whole[:30])
    assert len(read_ratings([path]).votes) == 1
    assert "last line is torn" in capsys.readouterr().err
    VoteFile(path).append(Vote.model_validate(line("bob", 0, 1, "b")))
    assert [vote.rater for vote in read_ratings([path]).votes] == ["ann", "bob"]


def strengths_by_hand(outcomes: Sequence[tuple[int, int, float]], videos: int) -> np.ndarray:
    """Maximum of the posterior by its formula: (a, b, share of a), normal prior of standard deviation 2."""

    def loss(strength: np.ndarray) -> float:
        likelihood = sum(
            share * np.log(1 / (1 + np.exp(strength[b] - strength[a])))
            + (1 - share) * np.log(1 / (1 + np.exp(strength[a] - strength[b])))
            for a, b, share in outcomes
        )
        return float(np.sum(strength**2) / (2 * 2.0**2) - likelihood)

    return np.asarray(minimize(loss, np.zeros(videos), method="BFGS", options={"gtol": 1e-8}).x)


def test_votes_give_bradley_terry_strengths(samples: Path, tmp_path: Path) -> None:
    lines = [
        line("ann", 0, 1, "b"),
        line("bob", 0, 1, "b"),
        line("ann", 2, 3, "tie"),
        line("ann", 1, 2, "a"),
        line("bob", 3, 0, "skip"),
        # The second vote of a rater on a pair measures the rater, not the videos.
        line("ann", 1, 0, "b", showing=2),
        line("ann", 4, 5, "b"),
    ]
    found = scored(samples, written(tmp_path / "r.jsonl", lines))
    expected = strengths_by_hand([(0, 1, 0), (0, 1, 0), (2, 3, 0.5), (1, 2, 1)], 4)
    assert [found[index] for index in range(4)] == pytest.approx(expected, abs=1e-4)
    assert found[5] == pytest.approx(-found[4])
    assert found[5] > 0.5


def test_numbers_are_standardised_by_rater(samples: Path, tmp_path: Path) -> None:
    # The same order on other scales; carl says nothing.
    given = {"ann": [1, 2, 3, 4, 5, 6], "bob": [10, 20, 30, 40, 50, 60], "carl": [7, 7, 7, 7, 7, 7]}
    lines = [
        {"rater": rater, "file": f"{index:05d}.mp4", "rating": value}
        for rater, values in given.items()
        for index, value in enumerate(values)
    ]
    found = scored(samples, written(tmp_path / "r.jsonl", lines))
    expected = (np.arange(6) - 2.5) / np.std(np.arange(6)) * 2 / 3
    assert [found[index] for index in range(6)] == pytest.approx(expected)


def test_what_nobody_rated_is_refused_or_left_out_and_counted(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings = written(tmp_path / "r.jsonl", [line("ann", 0, 1, "b"), line("ann", 1, 2, "a")])
    with pytest.raises(UserError, match=r"00003.mp4 has no rating, as 3 of 6; .*--unrated skip"):
        scored(samples, ratings)
    assert set(scored(samples, ratings, "--unrated", "skip")) == {0, 1, 2}
    assert "3 left out as unrated" in capsys.readouterr().out
    pair.main(["--samples", str(samples), "--scores", str(tmp_path / "scores.jsonl"), "--out", str(tmp_path / "pairs")])
    report = json.loads((tmp_path / "pairs" / pair.REPORT_FILE).read_text())
    assert (report["pairs"], report["left_out"]) == (1, {"unrated": 3})


def test_a_file_of_ratings_that_is_not_there(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: cannot be read: No such file"):
        scored(samples, tmp_path / "none.jsonl")


def test_scores_of_a_file_that_grew_are_not_mixed(samples: Path, tmp_path: Path) -> None:
    ratings = written(tmp_path / "r.jsonl", [line("ann", 0, 1, "b")])
    scored(samples, ratings, "--unrated", "skip")
    written(ratings, [line("ann", 0, 1, "b"), line("ann", 2, 3, "b")])
    with pytest.raises(UserError, match=r"holds scores by .*; choose another"):
        scored(samples, ratings, "--unrated", "skip")


def test_pairs_are_those_that_people_compared(samples: Path, tmp_path: Path) -> None:
    lines = [
        *(line(rater, 0, 1, "b") for rater in ("ann", "bob", "carl")),
        line("ann", 2, 3, "a"),
        line("bob", 2, 3, "b"),
        line("carl", 2, 3, "b"),
        line("ann", 0, 2, "a"),
        line("bob", 2, 0, "a"),
        line("ann", 4, 5, "skip"),
    ]
    ratings = written(tmp_path / "r.jsonl", lines)
    pair.main(["--samples", str(samples), "--ratings", str(ratings), "--out", str(tmp_path / "pairs")])
    report = json.loads((tmp_path / "pairs" / pair.REPORT_FILE).read_text())
    assert (report["pairs"], report["left_out"]) == (2, {"undecided": 1, "tie": 1})
    assert report["ratings"] == {
        "files": [str(ratings)],
        "raters": 3,
        "votes": 8,
        "compared": 4,
        "split": 2,
        "votes_elsewhere": 0,
    }
    dataset = ShardDataset(tmp_path / "pairs")
    members = {
        (found.metadata["winner_seed"], found.metadata["loser_seed"]): found.metadata["margin"]
        for found in (dataset[0], dataset[1])
    }
    assert members == {(1, 0): 1.0, (3, 2): pytest.approx(1 / 3)}
    with pytest.raises(UserError, match="no pair is left"):
        pair.main(
            ["--samples", str(samples), "--ratings", str(ratings), "--out", str(tmp_path / "none"), "--margin", "1.1"]
        )


def both(rater: str, index: int, said: str, before: Path, after: Path) -> dict[str, object]:
    return line(rater, index, index, said, samples_a=str(before), samples_b=str(after))


def people(before: Path, after: Path, ratings: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    win_rate.main(["--before", str(before), "--after", str(after), "--ratings", str(ratings), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_human_win_rate(
    samples: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [("ann", 0, "b"), ("bob", 0, "b"), ("ann", 1, "b"), ("bob", 1, "a"), ("ann", 2, "a"), ("ann", 3, "skip")]
    lines = [both(*vote, samples, other_model) for vote in said]
    lines.append(line("ann", 0, 1, "a", samples_a=str(samples), samples_b=str(samples)))
    found = people(samples, other_model, written(tmp_path / "r.jsonl", lines), capsys)
    counts = {name: found[name] for name in ("wins", "ties", "losses", "split", "skipped", "unrated", "elsewhere")}
    assert counts == {"wins": 1, "ties": 1, "losses": 1, "split": 1, "skipped": 1, "unrated": 3, "elsewhere": 1}
    assert found["win_rate"] == 0.5
    assert found["raters"] == {"ann": pytest.approx(2 / 3), "bob": 0.5}
    assert found["interval_95"][0] < 0.5 < found["interval_95"][1]


def test_the_other_way_round_the_win_rate_is_the_rest(
    samples: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [("ann", 0, "b"), ("ann", 1, "b"), ("ann", 2, "tie"), ("ann", 4, "a")]
    ratings = written(tmp_path / "r.jsonl", [both(*vote, samples, other_model) for vote in said])
    there, back = people(samples, other_model, ratings, capsys), people(other_model, samples, ratings, capsys)
    assert there["win_rate"] == pytest.approx(2.5 / 4)
    assert there["win_rate"] + back["win_rate"] == pytest.approx(1)


def test_votes_follow_their_videos_by_content(
    samples: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = {f"sha256_{end}": file_sha256(at / "00000.mp4") for end, at in (("a", samples), ("b", other_model))}
    vote = {**both("ann", 0, "b", samples, other_model), **sums}
    ratings = written(tmp_path / "r.jsonl", [vote])
    moved = [Path(shutil.copytree(at, tmp_path / f"moved {at.name}")) for at in (samples, other_model)]
    assert people(moved[0], moved[1], ratings, capsys)["wins"] == 1
    vote |= {"samples_a": str(moved[0]), "samples_b": str(moved[1])}
    written(ratings, [vote])
    shutil.copy(moved[0] / "00003.mp4", moved[0] / "00000.mp4")
    with pytest.raises(UserError, match=r"line 1: .* is not the video any more that was rated"):
        people(moved[0], moved[1], ratings, capsys)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (line("ann", 0, 77, "a"), "line 1: index=77 is no sample of"),
        ({"rater": "ann", "prompt": "four", "vote": "a"}, "line 1: names no video .prompt=four.; give file, index"),
        (line("ann", 0, 0, "a"), "compares a video with itself"),
        (line("ann", 0, 4, "a"), "are of different prompts"),
        (line("ann", 0, 1, "a", samples_a="/else", samples_b="/else"), "none of 1 votes is on samples of"),
        ({"rater": "ann", "index": 0, "rating": 3}, "pairs need votes; score numbers with"),
    ],
)
def test_votes_that_fit_no_sample(values: dict[str, object], said: str, samples: Path, tmp_path: Path) -> None:
    ratings = written(tmp_path / "r.jsonl", [values])
    with pytest.raises(UserError, match=said):
        pair.main(["--samples", str(samples), "--ratings", str(ratings), "--out", str(tmp_path / "pairs")])


def test_which_of_two_folders_must_be_said(
    samples: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings = written(tmp_path / "r.jsonl", [line("ann", 0, 0, "a")])
    with pytest.raises(UserError, match="say which with the columns samples_a and samples_b"):
        people(samples, other_model, ratings, capsys)
    written(ratings, [line("ann", 0, 0, "b", samples_a="before", samples_b="after")])
    assert people(samples, other_model, ratings, capsys)["wins"] == 1
