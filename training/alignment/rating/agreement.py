"""`megatron-video dpo agreement`: how far raters agree, with each other and with themselves.

Of a rater the first vote on a pair counts; later ones measure agreement with themself. Chance-corrected figures are 1
where all agree and 0 where they agree as often as by chance: Cohen's kappa for two raters (J. Cohen, 1960),
Krippendorff's alpha for any number (K. Krippendorff, 2011). Numbers have alpha on the interval scale alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron_video.cli import run_command
from training.alignment.rating.votes import Rating, Vote, read_ratings
from training.proportions import wilson_interval

# Rater -> item -> what was said: 0, 1 or 2 for a vote, the number for a rating.
Table = Mapping[str, Mapping[object, float]]
_CODES = {"a": 0.0, "b": 1.0, "tie": 2.0}
_OTHER_WAY = {"a": "b", "b": "a"}


def main(argv: Sequence[str]) -> int:
    """Print the statistics of some files of ratings.

    Raises:
        UserError: a file that cannot be read, or a line that is no rating.
    """
    arguments = _parse(argv)
    ratings = read_ratings(arguments.ratings)
    report: dict[str, Any] = {}
    if ratings.votes:
        report["votes"] = vote_agreement(ratings.votes)
    if ratings.numbers:
        report["numbers"] = number_agreement(ratings.numbers)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else _page(report))
    return 0


def vote_agreement(votes: Sequence[Vote]) -> dict[str, Any]:
    """Figures over votes on pairs; None where there is nothing to tell it by."""
    votes = _one_way_round(votes)
    first, again = _first_and_again(votes)
    table = {
        rater: {pair: _CODES[vote.vote] for pair, vote in own.items() if vote.vote in _CODES}
        for rater, own in first.items()
    }
    return {
        "pairs": len({pair for own in first.values() for pair in own}),
        "votes": len(votes),
        **_overall(table, "nominal"),
        "raters": {rater: _rater(rater, votes, first[rater], again) for rater in sorted(first)},
        "rater_pairs": [_two(one, other, table) for one, other in combinations(sorted(table), 2)],
    }


def number_agreement(ratings: Sequence[Rating]) -> dict[str, Any]:
    """Figures over numbers: alpha on the interval scale."""
    said: dict[str, dict[object, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rating in ratings:
        said[rating.rater][rating.video.key].append(rating.rating)
    table = {rater: {item: float(np.mean(own)) for item, own in items.items()} for rater, items in said.items()}
    return {
        "videos": len({item for own in table.values() for item in own}),
        "ratings": len(ratings),
        "alpha": alpha(table, "interval"),
        "raters": {rater: {"ratings": sum(map(len, items.values()))} for rater, items in sorted(said.items())},
    }


def cohens_kappa(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kappa of two raters' answers to the same items; None without items, or where chance alone agrees always."""
    if not one:
        return None
    observed = np.mean(np.equal(one, other))
    shares = [Counter(answers) for answers in (one, other)]
    expected = sum(shares[0][answer] * shares[1][answer] for answer in shares[0]) / len(one) ** 2
    return None if expected == 1 else float((observed - expected) / (1 - expected))


def alpha(table: Table, scale: str) -> float | None:
    """Krippendorff's alpha; raters may have left items out. None where no item has two answers, or all are equal."""
    # Here: nothing else of this command needs it, and it takes a second to import.
    from nltk.metrics.agreement import AnnotationTask
    from nltk.metrics.distance import binary_distance, interval_distance

    times = Counter(item for own in table.values() for item in own)
    numbers = {item: number for number, item in enumerate(times) if times[item] > 1}
    shared = [
        (rater, numbers[item], said) for rater, own in table.items() for item, said in own.items() if item in numbers
    ]
    if len({said for _, _, said in shared}) < 2:
        return None
    distance = {"nominal": binary_distance, "interval": interval_distance}[scale]
    return float(AnnotationTask(shared, distance=distance).alpha())


def _overall(table: Table, scale: str) -> dict[str, Any]:
    same = total = 0
    for one, other in combinations(table.values(), 2):
        common = one.keys() & other.keys()
        same, total = same + sum(one[item] == other[item] for item in common), total + len(common)
    return {"compared_twice": total, "raw_agreement": same / total if total else None, "alpha": alpha(table, scale)}


def _two(one: str, other: str, table: Table) -> dict[str, Any]:
    common = sorted(table[one].keys() & table[other].keys(), key=repr)
    ours, theirs = ([table[rater][item] for item in common] for rater in (one, other))
    agree = float(np.mean(np.equal(ours, theirs))) if common else None
    return {
        "raters": [one, other],
        "pairs": len(common),
        "raw_agreement": agree,
        "kappa": cohens_kappa(ours, theirs),
    }


def _rater(
    rater: str, votes: Sequence[Vote], first: Mapping[object, Vote], again: Sequence[tuple[Vote, Vote]]
) -> dict[str, Any]:
    own = [vote for vote in votes if vote.rater == rater]
    sides = [vote.vote == vote.left for vote in own if vote.left and vote.vote in ("a", "b")]
    repeats = [(old.vote, new.vote) for old, new in again if old.rater == rater and "skip" not in (old.vote, new.vote)]
    seconds = [vote.seconds for vote in own if vote.seconds]
    said = Counter(vote.vote for vote in first.values())
    return {
        "pairs": len(first),
        "tie_share": said["tie"] / len(first),
        "skip_share": said["skip"] / len(first),
        "left_share": sum(sides) / len(sides) if sides else None,
        "left_interval_95": list(wilson_interval(sum(sides), len(sides))) if sides else None,
        "repeated": len(repeats),
        "self_agreement": sum(old == new for old, new in repeats) / len(repeats) if repeats else None,
        "votes_a_minute": 60 / median(seconds) if seconds else None,
    }


def _one_way_round(votes: Sequence[Vote]) -> list[Vote]:
    """The votes, each pair's with the videos in the order in which the pair first appears."""
    order: dict[object, object] = {}
    found = []
    for vote in votes:
        if order.setdefault(vote.pair, vote.a.key) == vote.a.key:
            found.append(vote)
        else:
            turned = {"vote": _OTHER_WAY.get(vote.vote, vote.vote), "left": _OTHER_WAY.get(vote.left or "")}
            found.append(vote.model_copy(update=turned))
    return found


def _first_and_again(votes: Sequence[Vote]) -> tuple[dict[str, dict[object, Vote]], list[tuple[Vote, Vote]]]:
    first: dict[str, dict[object, Vote]] = defaultdict(dict)
    again = []
    for vote in votes:
        earlier = first[vote.rater].setdefault(vote.pair, vote)
        if earlier is not vote:
            again.append((earlier, vote))
    return dict(first), again


def _page(report: Mapping[str, Any]) -> str:
    parts = []
    if votes := report.get("votes"):
        parts.append(_vote_page(votes))
    if numbers := report.get("numbers"):
        parts.append(
            f"{numbers['ratings']} numbers for {numbers['videos']} videos by {len(numbers['raters'])} raters: "
            f"Krippendorff's alpha (interval) {_figure(numbers['alpha'])}"
        )
    return "\n\n".join(parts)


def _vote_page(votes: Mapping[str, Any]) -> str:
    lines = [
        f"{votes['votes']} votes on {votes['pairs']} pairs by {len(votes['raters'])} raters",
        f"raw agreement {_share(votes['raw_agreement'])} of {votes['compared_twice']} times that two raters judged a "
        f"pair; Krippendorff's alpha (nominal) {_figure(votes['alpha'])}",
        "",
        f"{'rater':<16} {'pairs':>6} {'ties':>7} {'skipped':>8} {'left':>7} {'95 % interval':>17} "
        f"{'with self':>16} {'votes/min':>10}",
    ]
    lines += [_rater_line(rater, own) for rater, own in votes["raters"].items()]
    if votes["rater_pairs"]:
        lines += ["", f"{'two raters':<33} {'pairs':>6} {'agree':>7} {'kappa':>7}"]
        lines += [
            f"{' and '.join(two['raters']):<33} {two['pairs']:>6} {_share(two['raw_agreement']):>7} "
            f"{_figure(two['kappa']):>7}"
            for two in votes["rater_pairs"]
        ]
    return "\n".join(lines)


def _rater_line(rater: str, own: Mapping[str, Any]) -> str:
    interval = own["left_interval_95"]
    between = f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else "-"
    repeated = f"{_share(own['self_agreement'])} of {own['repeated']}"
    return (
        f"{rater:<16} {own['pairs']:>6} {own['tie_share']:>7.1%} {own['skip_share']:>8.1%} "
        f"{_share(own['left_share']):>7} {between:>17} {repeated:>16} {_figure(own['votes_a_minute'], 1):>10}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo agreement", description=__doc__)
    parser.add_argument("ratings", type=Path, nargs="+", help=".jsonl or .csv, of `dpo rate` or elsewhere")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
