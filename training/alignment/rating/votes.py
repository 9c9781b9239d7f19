"""Files of human ratings: votes on pairs and numbers for videos, as JSON lines or CSV.

The columns are the fields of `Vote` and `Rating`; further ones are ignored. A line with `vote` is a vote, one with
`rating` a number.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from io import FileIO, StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeFloat, PositiveInt, ValidationError

from megatron_video.errors import UserError
from megatron_video.files import sync

Side = Literal["a", "b"]
Choice = Literal["a", "b", "tie", "skip"]


@dataclass(frozen=True)
class Member:
    """How a line names a video: by file, by index, or by prompt and seed; with two folders, by `samples` too."""

    samples: str | None
    file: str | None
    index: int | None
    prompt: str | None
    seed: int | None
    sha256: str | None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for one video; the content's checksum says it best, wherever the file lies."""
        return (self.sha256, self.prompt) if self.sha256 else astuple(self)


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True)

    rater: str = Field(min_length=1)
    """Name of who rated."""
    prompt: str | None = None
    where: str = Field(default="", exclude=True)
    """File and line, for errors."""

    def _member(self, end: str) -> Member:
        found = {name: getattr(self, name + end) for name in ("samples", "file", "index", "seed", "sha256")}
        return Member(prompt=self.prompt, **found)


class Vote(_Line):
    """One judgement of two videos."""

    samples_a: str | None = None
    """Folder of the first video; needed where files of two folders are compared without checksums."""
    file_a: str | None = None
    index_a: int | None = None
    seed_a: int | None = None
    sha256_a: str | None = None
    """Of the file that was seen: a vote on a video that changed since is refused."""
    samples_b: str | None = None
    file_b: str | None = None
    index_b: int | None = None
    seed_b: int | None = None
    sha256_b: str | None = None
    vote: Literal["a", "b", "tie", "skip", "undo"]
    """The better one; `skip`: both bad, or cannot say; `undo` takes the rater's last vote on this showing back."""
    left: Side | None = None
    """Which was on the left."""
    showing: PositiveInt = 1
    """2 where the rater had judged the pair before."""
    seconds: NonNegativeFloat | None = None
    """How long it took."""
    time: str | None = None
    """When, ISO 8601."""

    @property
    def a(self) -> Member:
        """The first video."""
        return self._member("_a")

    @property
    def b(self) -> Member:
        """The second video."""
        return self._member("_b")

    @property
    def pair(self) -> frozenset[tuple[object, ...]]:
        """The two videos, whatever their order."""
        return frozenset((self.a.key, self.b.key))


class Rating(_Line):
    """A number that one person gave to one video, larger for better, on a scale of the rater's own."""

    samples: str | None = None
    file: str | None = None
    index: int | None = None
    seed: int | None = None
    sha256: str | None = None
    rating: FiniteFloat

    @property
    def video(self) -> Member:
        """The video."""
        return self._member("")


@dataclass(frozen=True)
class Ratings:
    """Everything that some files say."""

    votes: list[Vote]
    """In order, without what was taken back."""
    numbers: list[Rating]

    @property
    def raters(self) -> list[str]:
        """Names, in the order in which they appear."""
        return list(dict.fromkeys(line.rater for line in (*self.votes, *self.numbers)))


def read_ratings(paths: Sequence[Path]) -> Ratings:
    """All ratings of .jsonl and .csv files.

    Raises:
        UserError: a file that cannot be read or is empty, or a line that is no rating, by its number.
    """
    lines = [line for path in paths for line in _read(path)]
    votes = [line for line in lines if isinstance(line, Vote)]
    found = Ratings(standing_votes(votes), [line for line in lines if isinstance(line, Rating)])
    if not found.votes and not found.numbers:
        raise UserError(f"{', '.join(map(str, paths))}: no rating there; `megatron-video dpo rate` collects some")
    return found


def standing_votes(votes: Sequence[Vote]) -> list[Vote]:
    """The votes less those that a later `undo` of the same rater, pair and showing takes back."""
    standing: list[Vote] = []
    for vote in votes:
        if vote.vote != "undo":
            standing.append(vote)
            continue
        same = (vote.rater, vote.pair, vote.showing)
        given = [number for number, old in enumerate(standing) if (old.rater, old.pair, old.showing) == same]
        if given:
            del standing[given[-1]]
    return standing


class VoteFile:
    """A JSON-lines file that several raters may add votes to at once, also from several processes.

    Raises:
        UserError: it cannot be written, or holds something else than votes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix != ".jsonl":
            raise UserError(f"--out {path} must end in .jsonl: votes are added line by line")
        try:
            # Now, not after the first vote.
            with self._locked():
                pass
            sync(path.parent)
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written: {error.strerror}") from None

    def votes(self) -> list[Vote]:
        """The votes that stand, of all raters.

        Raises:
            UserError: a line that is no vote.
        """
        lines = list(_read(self.path))
        if any(isinstance(line, Rating) for line in lines):
            raise UserError(f"--out {self.path} holds numbers, not votes; choose another file")
        return standing_votes([line for line in lines if isinstance(line, Vote)])

    def append(self, vote: Vote) -> None:
        """Add a line; it is on the disk when this returns, or not in the file at all.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        line = (vote.model_dump_json(exclude_none=True) + "\n").encode()
        with self._locked() as file:
            end = _end_of_whole_lines(file)
            # What a power loss tore was never acknowledged.
            file.truncate(end)
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        # Unbuffered: a line goes to the disk in one piece.
        with FileIO(self.path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _end_of_whole_lines(file: FileIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if not size or file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _read(path: Path) -> Iterator[Vote | Rating]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{path}: cannot be read: {said}") from None
    if path.suffix == ".jsonl":
        lines = _json_lines(path, text)
    elif path.suffix == ".csv":
        lines = _csv_lines(text)
    else:
        raise UserError(f"{path}: must be .jsonl or .csv")
    for number, values in lines:
        yield _parsed(values, f"{path}, line {number}")


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                print(f"{path}: its last line is torn and left out", file=sys.stderr)
                return
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number} is no rating: {line[:80]}")
        yield number, values


def _csv_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(StringIO(text, newline=""))
    for row in rows:
        yield rows.line_num, row


def _parsed(values: dict[str, Any], where: str) -> Vote | Rating:
    # An empty cell of a CSV file says nothing.
    given = {name: value for name, value in values.items() if value not in ("", None)}
    kinds: list[type[Vote] | type[Rating]] = [
        kind for name, kind in (("vote", Vote), ("rating", Rating)) if name in given
    ]
    if len(kinds) != 1:
        raise UserError(f"{where}: has the columns {', '.join(map(str, given))}; give either vote or rating")
    try:
        return kinds[0].model_validate({**given, "where": where})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = f"={given[name]!r}" if name in given else " is missing"
        raise UserError(f"{where}: {name}{found}: {first['msg']}") from None
