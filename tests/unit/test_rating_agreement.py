"""Agreement of raters: published examples, and votes whose figures can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.alignment.rating.agreement import alpha, cohens_kappa, main, vote_agreement
from training.alignment.rating.votes import Vote

# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: four observers, twelve units.
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}


def vote(rater: str, pair: int, said: str, **more: object) -> Vote:
    line = {"rater": rater, "prompt": "p", "seed_a": 2 * pair, "seed_b": 2 * pair + 1, "vote": said, **more}
    return Vote.model_validate(line)


@pytest.mark.parametrize(("scale", "published"), [("nominal", 0.743), ("interval", 0.849)])
def test_alpha_of_krippendorffs_own_example(scale: str, published: float) -> None:
    table = {
        rater: {unit: float(value) for unit, value in enumerate(values) if value is not None}
        for rater, values in OBSERVERS.items()
    }
    assert alpha(table, scale) == pytest.approx(published, abs=5e-4)


def test_kappa_against_its_definition() -> None:
    # 20 and 15 of 50 alike; marginals 25 and 30: (0.7 - 0.5) / (1 - 0.5).
    one = [0] * 20 + [0] * 5 + [1] * 10 + [1] * 15
    other = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert cohens_kappa(one, other) == pytest.approx(0.4)
    assert cohens_kappa([0, 1, 2], [0, 1, 2]) == 1
    assert cohens_kappa([0, 1], [1, 0]) == pytest.approx(-1)


def test_what_cannot_be_told_is_none() -> None:
    assert cohens_kappa([], []) is None
    assert cohens_kappa([0, 0], [0, 0]) is None
    assert alpha({"one": {0: 1.0, 1: 0.0}}, "nominal") is None
    assert alpha({"one": {0: 1.0}, "other": {0: 1.0}}, "nominal") is None


def test_figures_of_votes_counted_by_hand() -> None:
    votes = [
        vote("ann", 0, "a", left="a", seconds=2),
        vote("ann", 1, "b", left="a", seconds=4),
        vote("ann", 2, "tie", left="a", seconds=6),
        vote("ann", 3, "skip", left="a"),
        vote("ann", 0, "a", left="b", showing=2),
        vote("ann", 1, "a", left="b", showing=2),
        vote("bob", 0, "a", left="b"),
        vote("bob", 1, "a", left="b"),
        vote("bob", 3, "a", left="b"),
    ]
    found = vote_agreement(votes)
    assert (found["pairs"], found["votes"], found["compared_twice"], found["raw_agreement"]) == (4, 9, 2, 0.5)
    ann, bob = found["raters"]["ann"], found["raters"]["bob"]
    assert (ann["pairs"], ann["tie_share"], ann["skip_share"]) == (4, 0.25, 0.25)
    # Chosen by side: left, right, right, right.
    assert (ann["left_share"], bob["left_share"]) == (0.25, 0)
    assert ann["left_interval_95"][0] < 0.25 < ann["left_interval_95"][1]
    assert (ann["repeated"], ann["self_agreement"]) == (2, 0.5)
    assert (ann["votes_a_minute"], bob["votes_a_minute"]) == (15, None)
    assert found["rater_pairs"] == [{"raters": ["ann", "bob"], "pairs": 2, "raw_agreement": 0.5, "kappa": 0}]


def test_a_pair_named_the_other_way_round_is_the_same_pair() -> None:
    line = {"rater": "bob", "prompt": "p", "seed_a": 1, "seed_b": 0, "vote": "b", "left": "b"}
    found = vote_agreement([vote("ann", 0, "a", left="a"), Vote.model_validate(line)])
    assert (found["pairs"], found["raw_agreement"]) == (1, 1)
    assert found["raters"]["bob"]["left_share"] == 1


def test_the_command_prints_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes, numbers = tmp_path / "votes.jsonl", tmp_path / "numbers.csv"
    lines = [vote("ann", 0, "a"), vote("ann", 1, "b"), vote("bob", 0, "a"), vote("bob", 1, "b")]
    votes.write_text("".join(line.model_dump_json(exclude_none=True) + "\n" for line in lines))
    numbers.write_text("rater,index,rating\nann,0,1\nann,1,5\nbob,0,1\nbob,1,5\n")
    assert main([str(votes), str(numbers), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["votes"]["alpha"] == report["numbers"]["alpha"] == 1
    main([str(votes), str(numbers)])
    page = capsys.readouterr().out
    assert "raw agreement 100.0% of 2 times" in page
    assert "ann and bob" in page
    assert "4 numbers for 2 videos by 2 raters: Krippendorff's alpha (interval) 1.000" in page
