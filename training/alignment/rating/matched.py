"""Which samples a file of ratings is about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.files import file_sha256
from training.alignment.generated import Generated, Sample
from training.alignment.rating.votes import Member, Vote

_SHARES = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Video:
    """A sample of one of the folders that are compared."""

    folder: int
    """Its place among the folders."""
    sample: Sample


@dataclass(frozen=True)
class JudgedPair:
    """What all raters said of two videos; of each rater the first vote."""

    a: Video
    b: Video
    shares: dict[str, float]
    """Rater -> 1 for `a`, 0 for `b`, 0.5 for a tie; without those that said neither."""

    @property
    def balance(self) -> float:
        """Mean over the raters from -1 (all for `b`) to 1 (all for `a`)."""
        return 2 * sum(self.shares.values()) / len(self.shares) - 1

    @property
    def disagree(self) -> bool:
        """Whether both videos have votes."""
        return {0.0, 1.0} <= set(self.shares.values())


@dataclass(frozen=True)
class JudgedPairs:
    """All votes on pairs of some folders."""

    pairs: list[JudgedPair]
    """Those with at least one vote that says something."""
    skipped: list[JudgedPair]
    """Those that nobody could decide."""
    elsewhere: int
    """Votes on samples of other folders."""


class Matcher:
    """Finds the sample that a line of ratings names.

    Args:
        folders: where to look.
    """

    def __init__(self, folders: Sequence[Generated]) -> None:
        self._folders = folders
        self._checksum = cache(file_sha256)
        self._by_name: dict[object, list[Video]] = defaultdict(list)
        for video in (Video(place, sample) for place, folder in enumerate(folders) for sample in folder.samples):
            for name in (video.sample.file.name, video.sample.index, (video.sample.prompt, video.sample.seed)):
                self._by_name[name].append(video)

    @property
    def _names(self) -> str:
        return " and ".join(str(folder.folder) for folder in self._folders)

    def find(self, member: Member, where: str) -> Video | None:
        """The sample, or None if the line says that it is one of another folder.

        Raises:
            UserError: no such sample, several, or a file that changed since it was rated.
        """
        if member.file is None and member.index is None and (member.prompt is None or member.seed is None):
            raise UserError(f"{where}: names no video ({member}); give file, index, or prompt and seed")
        name = member.file or (member.index if member.index is not None else (member.prompt, member.seed))
        named = [video for video in self._by_name[name] if self._is_named(video, member)]
        found = [video for video in named if member.sha256 in (None, self._checksum(video.sample.file))]
        if len(found) > 1:
            # Equal files in both folders, which only the folder's own path tells apart.
            found = [video for video in found if self._is_path(video.folder, member)] or found
        if len(found) == 1 or (found and member.sha256):
            return found[0]
        if found:
            raise UserError(
                f"{where}: {member} is in both {self._names}; say which with the columns samples_a and samples_b"
            )
        self._check_elsewhere(member, where)
        return None

    def _check_elsewhere(self, member: Member, where: str) -> None:
        ours = any(self._is_path(place, member) for place in range(len(self._folders)))
        if member.samples is not None and not ours:
            return
        if member.sha256 is not None:
            raise UserError(f"{where}: {member} is not the video any more that was rated; rate the new one")
        raise UserError(f"{where}: {member} is no sample of {self._names}")

    def _is_named(self, video: Video, member: Member) -> bool:
        sample = video.sample
        wanted = (member.file, member.index, member.prompt, member.seed)
        found = (sample.file.name, sample.index, sample.prompt, sample.seed)
        if any(one not in (None, other) for one, other in zip(wanted, found, strict=True)):
            return False
        # A folder may have been moved; the checksum tells then.
        return member.samples is None or member.sha256 is not None or self._is_path(video.folder, member)

    def _is_path(self, place: int, member: Member) -> bool:
        if member.samples is None:
            return False
        folder = self._folders[place].folder
        return Path(member.samples).resolve() == folder.resolve() or member.samples == folder.resolve().name


def judged_pairs(votes: Sequence[Vote], folders: Sequence[Generated]) -> JudgedPairs:
    """The pairs of the folders' samples that the votes are about; repetitions do not count.

    Raises:
        UserError: a vote on a sample that is not there, or none on samples of the folders.
    """
    matcher = Matcher(folders)
    shares: dict[tuple[Video, Video], dict[str, float | None]] = defaultdict(dict)
    elsewhere = 0
    for vote in votes:
        a, b = matcher.find(vote.a, vote.where), matcher.find(vote.b, vote.where)
        if a is None or b is None:
            elsewhere += 1
            continue
        if a == b:
            raise UserError(f"{vote.where}: compares a video with itself ({vote.a})")
        share = _SHARES.get(vote.vote)
        turned = (b.folder, b.sample.index) < (a.folder, a.sample.index)
        said = 1 - share if turned and share is not None else share
        shares[(b, a) if turned else (a, b)].setdefault(vote.rater, said)
    if not shares:
        raise UserError(f"none of {len(votes)} votes is on samples of {' and '.join(str(f.folder) for f in folders)}")
    decided = [
        JudgedPair(a, b, {rater: share for rater, share in said.items() if share is not None})
        for (a, b), said in shares.items()
    ]
    skipped = [pair for pair in decided if not pair.shares]
    return JudgedPairs([pair for pair in decided if pair.shares], skipped, elsewhere)
