"""A number for every video from what people said: the scorer `ratings:FILE`.

Votes give Bradley-Terry strengths within each prompt (R. A. Bradley and M. E. Terry, 1952), numbers the mean over the
raters after each rater's own mean and spread are taken out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import choix
import numpy as np

from megatron_video.errors import UserError
from training.alignment.generated import Generated, Sample
from training.alignment.rating.matched import JudgedPair, Matcher, judged_pairs
from training.alignment.rating.votes import Rating, read_ratings
from training.alignment.scorers import Scorer, UnratedError

# Of a normal prior on the log-strengths: keeps a video that won all of its votes finite, and decides little else.
_PRIOR_STANDARD_DEVIATION = 2.0


def rating_scorer(files: Sequence[Path], generated: Generated) -> Scorer:
    """What the people of these files say of the samples.

    Raises:
        UserError: a file that cannot be read or has both votes and numbers, or a video that is not there.
    """
    ratings = read_ratings(files)
    if ratings.votes and ratings.numbers:
        raise UserError(f"{', '.join(map(str, files))}: votes and numbers are on other scales; score by one of them")
    if ratings.votes:
        numbers = strengths(judged_pairs(ratings.votes, [generated]).pairs)
    else:
        numbers = standardised_means(ratings.numbers, generated)

    missing = sum(sample.index not in numbers for sample in generated.samples)

    def score(sample: Sample) -> float:
        if sample.index not in numbers:
            raise UnratedError(
                f"{sample.file} has no rating, as {missing} of {len(generated.samples)}; rate them, or leave them out "
                "with --unrated skip"
            )
        return numbers[sample.index]

    return score


def strengths(pairs: Sequence[JudgedPair]) -> dict[int, float]:
    """Log-strength of every sample that has votes, by its number: comparable within a prompt, where their mean is 0.

    A tie is half a vote for each.
    """
    groups: dict[str, list[JudgedPair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.a.sample.prompt].append(pair)
    found: dict[int, float] = {}
    for group in groups.values():
        found.update(_fit(group))
    return found


def standardised_means(ratings: Sequence[Rating], generated: Generated) -> dict[int, float]:
    """Mean over the raters of a video's standardised numbers; one rater's numbers for it are averaged first.

    Raises:
        UserError: a number for a video that is not there, or none for the folder.
    """
    scales = _scales(ratings)
    matcher = Matcher([generated])
    said: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rating in ratings:
        video = matcher.find(rating.video, rating.where)
        if video is not None:
            mean, spread = scales[rating.rater]
            said[video.sample.index][rating.rater].append((rating.rating - mean) / spread)
    if not said:
        raise UserError(f"none of {len(ratings)} ratings is on samples of {generated.folder}")
    return {index: float(np.mean([np.mean(own) for own in raters.values()])) for index, raters in said.items()}


def _scales(ratings: Sequence[Rating]) -> Mapping[str, tuple[float, float]]:
    numbers: dict[str, list[float]] = defaultdict(list)
    for rating in ratings:
        numbers[rating.rater].append(rating.rating)
    # Who always gives one number says nothing: 0, whatever it is divided by.
    return {
        rater: (float(np.mean(own)), float(np.std(own)) if min(own) < max(own) else 1.0)
        for rater, own in numbers.items()
    }


def _fit(group: Sequence[JudgedPair]) -> dict[int, float]:
    indices = sorted({video.sample.index for pair in group for video in (pair.a, pair.b)})
    place = {index: number for number, index in enumerate(indices)}
    outcomes: list[tuple[int, int]] = []
    for pair in group:
        a, b = place[pair.a.sample.index], place[pair.b.sample.index]
        for share in pair.shares.values():
            # Every vote as two, so that a tie is one for each.
            outcomes += [(a, b)] * round(2 * share) + [(b, a)] * round(2 * (1 - share))
    # The library's objective is -log likelihood + penalty * sum of squares; its likelihood counts all votes twice here.
    penalty = 2 / (2 * _PRIOR_STANDARD_DEVIATION**2)
    return dict(zip(indices, map(float, choix.opt_pairwise(len(indices), outcomes, alpha=penalty)), strict=True))
