"""Preference pairs that people compared, for `megatron-video dpo pair --ratings`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_video.errors import UserError
from training.alignment.generated import Generated
from training.alignment.pair import Pair
from training.alignment.rating.matched import JudgedPair, JudgedPairs, judged_pairs
from training.alignment.rating.strength import strengths
from training.alignment.rating.votes import read_ratings


@dataclass(frozen=True)
class VotedPairs:
    """What people compared, ready to be chosen from."""

    candidates: list[Pair]
    """The majority's winner and loser; the margin is the share of votes for the one less that for the other."""
    strengths: dict[int, float]
    """Of all rated samples, by number."""
    left_out: Counter[str]
    """What is no candidate, by reason."""
    report: dict[str, Any]
    """Figures of the votes."""


def read_voted_pairs(files: Sequence[Path], generated: Generated, most: int | None) -> VotedPairs:
    """The pairs of the folder's samples that have votes, at most so many of a prompt, the clearest first.

    Raises:
        UserError: files without votes, on other samples, or on videos of different prompts.
    """
    votes = read_ratings(files).votes
    if not votes:
        raise UserError(
            f"--ratings {', '.join(map(str, files))}: pairs need votes; score numbers with `megatron-video dpo score "
            "--with ratings:FILE`, and pair by the scores"
        )
    judged = judged_pairs(votes, [generated])
    left_out: Counter[str] = Counter()
    if judged.skipped:
        left_out["undecided"] = len(judged.skipped)
    candidates, taken = [], Counter[str]()
    # A pair of more votes before one of fewer, where they are as clear.
    for pair in sorted(judged.pairs, key=lambda pair: (-abs(pair.balance), -len(pair.shares), pair.a.sample.index)):
        prompt = _common_prompt(pair)
        if most is not None and taken[prompt] == most:
            left_out["beyond --pairs-per-prompt"] += 1
            continue
        taken[prompt] += 1
        candidates.append(_candidate(pair))
    candidates.sort(key=lambda pair: (pair.winner.index, pair.loser.index))
    return VotedPairs(candidates, strengths(judged.pairs), left_out, _describe(judged, files))


def _candidate(pair: JudgedPair) -> Pair:
    a, b = pair.a.sample, pair.b.sample
    return Pair(a, b, pair.balance) if pair.balance >= 0 else Pair(b, a, -pair.balance)


def _common_prompt(pair: JudgedPair) -> str:
    one, other = pair.a.sample, pair.b.sample
    if one.prompt != other.prompt:
        raise UserError(f"--ratings: {one.file.name} and {other.file.name} are of different prompts; no pair of these")
    return one.prompt


def _describe(judged: JudgedPairs, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "files": list(map(str, files)),
        "raters": len({rater for pair in judged.pairs for rater in pair.shares}),
        "votes": sum(len(pair.shares) for pair in judged.pairs),
        "compared": len(judged.pairs) + len(judged.skipped),
        "split": sum(pair.disagree for pair in judged.pairs),
        "votes_elsewhere": judged.elsewhere,
    }
