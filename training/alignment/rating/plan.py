"""What one rater is asked, in which order, and which video is on which side.

Everything is a pure function of the samples, the seed and the rater's name, so a rater who starts again goes on. All
raters of a seed judge the same pairs, each in an order of their own and with sides of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from megatron_video.files import file_sha256
from training.alignment.generated import Generated, Sample, check_alike
from training.alignment.rating.votes import Choice, Side

# So many other pairs come between a pair and its second showing, if there are twice as many.
_REPEAT_DISTANCE = 20


@dataclass(frozen=True)
class Candidate:
    """One of the two videos of a pair."""

    folder: Path
    sample: Sample

    @cached_property
    def sha256(self) -> str:
        """Of the file, hex."""
        return file_sha256(self.sample.file)

    @property
    def key(self) -> tuple[object, ...]:
        """As `Member.key` of a vote."""
        return self.sha256, self.sample.prompt


@dataclass(frozen=True)
class AskedPair:
    """Two videos of one prompt."""

    a: Candidate
    b: Candidate

    @cached_property
    def key(self) -> frozenset[tuple[object, ...]]:
        """As a vote names the pair, by the contents of its files."""
        return frozenset((self.a.key, self.b.key))

    def draw(self, *words: object) -> bytes:
        """Random bytes for this pair, the same at every call with the same words."""
        members = [(video.sample.index, video.sample.prompt, video.sample.seed) for video in (self.a, self.b)]
        return hashlib.blake2b(json.dumps([*words, members]).encode(), digest_size=8, person=b"rating").digest()


@dataclass(frozen=True)
class Question:
    """A pair as it is shown once."""

    pair: AskedPair
    showing: int
    """1, or 2 where the rater's agreement with themself is measured."""
    left: Side

    def at(self, side: str) -> Candidate:
        """The video on the `left` or `right`."""
        return self.pair.a if (side == "left") == (self.left == "a") else self.pair.b

    def choice(self, said: str) -> Choice:
        """A vote for `left` or `right` as one for `a` or `b`; `tie` and `skip` stay."""
        if said == "left":
            return self.left
        if said == "right":
            return "b" if self.left == "a" else "a"
        return "tie" if said == "tie" else "skip"


def pairs_within(generated: Generated, most_of_prompt: int, seed: int) -> list[AskedPair]:
    """At most so many pairs of every prompt, its videos in equally many of them, or one more."""
    return [
        pair
        for samples in generated.by_prompt().values()
        for pair in islice(
            _tournament([Candidate(generated.folder, sample) for sample in samples], seed), most_of_prompt
        )
    ]


def pairs_between(before: Generated, after: Generated) -> list[AskedPair]:
    """The videos of one prompt and seed by two models.

    Raises:
        UserError: folders of other prompts, seeds or settings.
    """
    check_alike(before, after)
    theirs, ours = (
        sorted(side.samples, key=lambda sample: (sample.noise_key, sample.index)) for side in (before, after)
    )
    return [
        AskedPair(Candidate(before.folder, old), Candidate(after.folder, new))
        for old, new in zip(theirs, ours, strict=True)
    ]


def tellable(pairs: Sequence[AskedPair]) -> tuple[list[AskedPair], int]:
    """The pairs of different files, none twice, and how many are left out: nobody could tell those apart."""
    different = {pair.key: pair for pair in pairs if len(pair.key) == 2}
    return list(different.values()), len(pairs) - len(different)


def make_plan(pairs: Sequence[AskedPair], rater: str, seed: int, repeat: float) -> list[Question]:
    """All showings in the rater's order; a share of `repeat` of the pairs comes again later, sides exchanged."""
    ordered = sorted(pairs, key=lambda pair: pair.draw(seed, rater, "order"))
    first = [Question(pair, 1, _drawn_side(pair, seed, rater)) for pair in ordered]
    distance = min(_REPEAT_DISTANCE, len(first) // 2)
    repeatable = sorted(range(len(first) - distance), key=lambda place: first[place].pair.draw(seed, rater, "repeat"))
    places = [(float(place), question) for place, question in enumerate(first)]
    for place in repeatable[: round(repeat * len(first))]:
        shown = first[place]
        again = Question(shown.pair, 2, "b" if shown.left == "a" else "a")
        places.append((place + distance + 0.5, again))
    return [question for _, question in sorted(places, key=lambda item: item[0])]


def _tournament(videos: Sequence[Candidate], seed: int) -> Iterator[AskedPair]:
    """All pairs, round by round; in a round every video is in one pair, so that none waits while others have several.

    The circle method (J. Schurig, 1886): two rounds after each other link all videos, which strengths need.
    """
    ring: list[Candidate | None] = [*sorted(videos, key=lambda video: AskedPair(video, video).draw(seed))]
    if len(ring) % 2:
        ring.append(None)  # who meets it rests
    for _ in range(len(ring) - 1):
        for one, other in zip(ring[: len(ring) // 2], reversed(ring), strict=False):
            if one and other:
                first, second = sorted((one, other), key=lambda video: video.sample.index)
                yield AskedPair(first, second)
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _drawn_side(pair: AskedPair, seed: int, rater: str) -> Side:
    return "a" if pair.draw(seed, rater, "side")[0] % 2 else "b"
