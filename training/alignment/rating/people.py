"""What people say of two models: the win rate of a human evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_video.errors import UserError
from training.alignment.generated import check_alike, read_generated
from training.alignment.rating.matched import JudgedPair, judged_pairs
from training.alignment.rating.votes import read_ratings
from training.alignment.win_rate import WinRate, outcomes


@dataclass(frozen=True)
class HumanWinRate:
    """Outcomes over pairs of videos of one prompt and seed, each by the majority of its raters."""

    outcomes: WinRate
    """A pair's scores are shares of its votes, so balanced votes are a tie."""
    raters: dict[str, float]
    """Win rate by each rater's own votes, ties counting half."""
    votes: int
    split: int
    """Pairs on which raters preferred different videos."""
    skipped: int
    """Pairs that nobody could decide; they are unrated."""
    elsewhere: int
    """Votes on other pairs."""

    def values(self) -> dict[str, Any]:
        """For JSON, with the 95 % interval."""
        own = {name: value for name, value in vars(self).items() if name != "outcomes"}
        return {**self.outcomes.values(), **own}

    def __str__(self) -> str:
        by_rater = ", ".join(f"{name} {rate:.1%}" for name, rate in self.raters.items())
        return (
            f"{self.outcomes}\n{self.votes} votes, a pair's score is its share of them; by rater: {by_rater}\n"
            f"{self.split} pairs have raters for either side, {self.skipped} of the unrated could not be decided; "
            f"{self.elsewhere} votes are on other pairs"
        )


def compare_by_people(before: Path, after: Path, files: Sequence[Path]) -> HumanWinRate:
    """How often people prefer the videos in `after`.

    Raises:
        UserError: folders of other prompts, seeds or settings, or no vote on their pairs.
    """
    folders = [read_generated(before), read_generated(after)]
    check_alike(*folders)
    votes = read_ratings(files).votes
    if not votes:
        raise UserError(f"--ratings {', '.join(map(str, files))}: a win rate needs votes on pairs, not numbers")
    judged = judged_pairs(votes, folders)
    pairs = [pair for pair in judged.pairs if _one_noise(pair)]
    if not pairs:
        raise UserError(
            f"--ratings {', '.join(map(str, files))}: no vote is on one prompt and seed in both {before} and {after}; "
            f"`megatron-video dpo rate --samples {before} --against {after}`"
        )
    # Folder 0 is `a`: its balance counts for `before`.
    shares = {pair.a.sample.noise_key: ((1 + pair.balance) / 2, (1 - pair.balance) / 2) for pair in pairs}
    return HumanWinRate(
        outcomes(shares, folders[1]),
        _by_rater(pairs),
        votes=sum(len(pair.shares) for pair in pairs),
        split=sum(pair.disagree for pair in pairs),
        skipped=sum(map(_one_noise, judged.skipped)),
        elsewhere=judged.elsewhere + sum(len(pair.shares) for pair in judged.pairs if not _one_noise(pair)),
    )


def _one_noise(pair: JudgedPair) -> bool:
    a, b = pair.a, pair.b
    return a.folder != b.folder and a.sample.noise_key == b.sample.noise_key


def _by_rater(pairs: Sequence[JudgedPair]) -> dict[str, float]:
    shares: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        for rater, share in pair.shares.items():
            shares[rater].append(1 - share)
    return {rater: mean(own) for rater, own in sorted(shares.items())}
