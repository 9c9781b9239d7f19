"""`megatron-video dpo win-rate`: how often one model's video beats another's of the same prompt and initial noise.

A tie counts half, as in the paper's table of Video-DPO (arXiv 2502.10248, 9.7).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from training.alignment.generated import Generated, check_alike, read_generated
from training.alignment.score import scored_alone
from training.proportions import wilson_interval


@dataclass(frozen=True)
class WinRate:
    """Outcomes over prompts and seeds."""

    wins: int
    ties: int
    losses: int
    mean_before: float
    mean_after: float
    unrated: int = 0
    """Prompts and seeds that nobody judged in both folders; they do not count."""
    by_category: dict[str, WinRate] = field(default_factory=dict)
    """Of the prompts of every category, where the list of prompts names some."""

    @property
    def rate(self) -> float:
        """Share of wins, ties counting half."""
        return (self.wins + self.ties / 2) / (self.wins + self.ties + self.losses)

    def values(self) -> dict[str, Any]:
        """For JSON, with the 95 % interval."""
        total = self.wins + self.ties + self.losses
        low, high = wilson_interval(round(self.rate * total), total)
        counts = {name: value for name, value in vars(self).items() if name != "by_category"}
        parts = {name: part.values() for name, part in self.by_category.items()}
        return {"win_rate": self.rate, "interval_95": [low, high], **counts} | ({"by_category": parts} if parts else {})

    def __str__(self) -> str:
        """In words, a line for the whole and one for every category."""
        low, high = self.values()["interval_95"]
        head = (
            f"win rate {self.rate:.1%} (95 % interval {low:.1%} to {high:.1%}; {self.wins} won, {self.ties} tied, "
            f"{self.losses} lost); mean score {self.mean_before:.4g} -> {self.mean_after:.4g}"
            + (f"; {self.unrated} unrated do not count" if self.unrated else "")
        )
        width = max(map(len, self.by_category), default=0)
        return "\n".join([head, *(f"  {name:<{width}}  {part}" for name, part in self.by_category.items())])


def main(argv: Sequence[str]) -> int:
    """Compare two folders by their scores, or by what people said.

    Raises:
        UserError: folders of other prompts, seeds or settings, or without scores.
    """
    arguments = _parse(argv)
    if arguments.ratings:
        # Here: the module needs this one.
        from training.alignment.rating.people import compare_by_people

        people = compare_by_people(arguments.before, arguments.after, arguments.ratings)
        head = f"{arguments.after} against {arguments.before}, by people: "
        print(json.dumps(people.values(), ensure_ascii=False) if arguments.json else f"{head}{people}")
        return 0
    found = compare(arguments.before, arguments.after, arguments.scores)
    head = f"{arguments.after} against {arguments.before}: "
    print(json.dumps(found.values(), ensure_ascii=False) if arguments.json else f"{head}{found}")
    return 0


def compare(before: Path, after: Path, scores: str = "scores.jsonl") -> WinRate:
    """Outcomes of the samples in `after` against those in `before`, by the file `scores` in each.

    Raises:
        UserError: folders of other prompts, seeds or settings, or without scores.
    """
    old, new = read_generated(before), read_generated(after)
    check_alike(old, new)
    old_scores, new_scores = (_by_noise(side, side.folder / scores) for side in (old, new))
    pairs = {key: (old_scores[key], new_scores[key]) for key in old_scores if key in new_scores}
    if not pairs:
        raise UserError(f"{before} and {after}: no prompt and seed has a score in both {scores}")
    return outcomes(pairs, new)


def outcomes(pairs: Mapping[tuple[str, int], tuple[float, float]], new: Generated) -> WinRate:
    """Outcomes of (before, after) by prompt and seed, over all and by the categories of the samples in `new`."""
    parts = {}
    for name, samples in new.by_category().items():
        rated = [pairs[sample.noise_key] for sample in samples if sample.noise_key in pairs]
        if rated:
            parts[name] = _outcomes(rated, len(samples) - len(rated))
    return replace(_outcomes(list(pairs.values()), len(new.samples) - len(pairs)), by_category=parts)


def _outcomes(pairs: Sequence[tuple[float, float]], unrated: int) -> WinRate:
    return WinRate(
        wins=sum(now > then for then, now in pairs),
        ties=sum(now == then for then, now in pairs),
        losses=sum(now < then for then, now in pairs),
        mean_before=sum(then for then, _ in pairs) / len(pairs),
        mean_after=sum(now for _, now in pairs) / len(pairs),
        unrated=unrated,
    )


def _by_noise(side: Generated, path: Path) -> dict[tuple[str, int], float]:
    rated, scores, _ = scored_alone(side, path)
    return {sample.noise_key: scores[sample.index] for sample in rated.samples}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo win-rate", description=__doc__)
    add = parser.add_argument
    add("--before", type=Path, required=True, help="folder of scored samples")
    add("--after", type=Path, required=True, help="of the same prompts and seeds by the other model")
    add("--ratings", type=Path, nargs="+", metavar="FILE", help="by votes of `megatron-video dpo rate --against`")
    add("--scores", default="scores.jsonl", help="name of the file with scores in both folders (default: %(default)s)")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
