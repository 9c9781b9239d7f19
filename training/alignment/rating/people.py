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
from training.alignment.win_rate import WinRate


@dataclass(frozen=True)
class HumanWinRate:
    """Outcomes over pairs of videos of one prompt and seed, each by the majority of its raters."""

    outcomes: WinRate
    """A pair whose votes are balanced is a tie; `mean_before` and `mean_after` are shares of votes."""
    raters: dict[str, float]
    """Win rate by each rater's own votes, ties counting half."""
    votes: int
    split: int
    """Pairs on which raters preferred different videos."""
    skipped: int
    """Pairs that nobody could decide."""
    elsewhere: int
    """Votes on other pairs."""

    def values(self) -> dict[str, Any]:
        """For JSON, with the 95 % interval."""
        own = {name: value for name, value in vars(self).items() if name != "outcomes"}
        return {**self.outcomes.values(), **own}

    def __str__(self) -> str:
        found = self.outcomes
        low, high = found.values()["interval_95"]
        by_rater = ", ".join(f"{name} {rate:.1%}" for name, rate in self.raters.items())
        return (
            f"win rate {found.rate:.1%} (95 % interval {low:.1%} to {high:.1%}; {found.wins} pairs won, "
            f"{found.ties} tied, {found.losses} lost, by the majority of {self.votes} votes; "
            f"{self.split} pairs with raters for either side)\nby rater: {by_rater}\n"
            f"not counted: {self.skipped} pairs that nobody could decide, {found.unrated} without a vote, "
            f"{self.elsewhere} votes on other pairs"
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
    skipped = sum(map(_one_noise, judged.skipped))
    if not pairs:
        raise UserError(
            f"--ratings {', '.join(map(str, files))}: no vote is on one prompt and seed in both {before} and {after}; "
            f"`megatron-video dpo rate --samples {before} --against {after}`"
        )
    # Folder 0 is `a`: shares are those of `before`.
    old = mean(share for pair in pairs for share in pair.shares.values())
    outcomes = WinRate(
        wins=sum(pair.balance < 0 for pair in pairs),
        ties=sum(pair.balance == 0 for pair in pairs),
        losses=sum(pair.balance > 0 for pair in pairs),
        mean_before=old,
        mean_after=1 - old,
        unrated=len(folders[0].samples) - len(pairs) - skipped,
    )
    return HumanWinRate(
        outcomes,
        _by_rater(pairs),
        votes=sum(len(pair.shares) for pair in pairs),
        split=sum(pair.disagree for pair in pairs),
        skipped=skipped,
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
