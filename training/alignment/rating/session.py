"""One rater at work: what is asked next, what was said, and taking it back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from megatron_video.errors import UserError
from training.alignment.rating.plan import Candidate, Question
from training.alignment.rating.votes import Vote, VoteFile


class OutOfTurnError(Exception):
    """A vote for a question that is not the one being asked, as from a second window."""


class Session:
    """The state is the file of votes: it is read again at every request, so that nothing is held twice.

    Args:
        plan: all questions in order.
        file: where votes go.
        rater: whose votes they are.
    """

    def __init__(self, plan: Sequence[Question], file: VoteFile, rater: str) -> None:
        self.plan, self.rater = plan, rater
        self._file = file
        self._lock = threading.Lock()
        self._places = {(question.pair.key, question.showing): place for place, question in enumerate(plan)}

    def answers(self) -> dict[int, Vote]:
        """The rater's votes by place in the plan, in the order in which they were given."""
        own = [vote for vote in self._file.votes() if vote.rater == self.rater]
        return {self._places[key]: vote for vote in own if (key := (vote.pair, vote.showing)) in self._places}

    def others(self) -> int:
        """How many votes of the file are other raters', or not on this plan."""
        return len(self._file.votes()) - len(self.answers())

    def state(self) -> dict[str, Any]:
        """What the page shows; names no model and no file."""
        answers = self.answers()
        waiting = [place for place in range(len(self.plan)) if place not in answers]
        asked = waiting[0] if waiting else None
        return {
            "rater": self.rater,
            "done": len(answers),
            "total": len(self.plan),
            "question": None if asked is None else self._shown(asked),
            # So that the page can load its videos ahead.
            "next": self._shown(waiting[1]) if len(waiting) > 1 else None,
            "last": self._said(*list(answers.items())[-1]) if answers else None,
        }

    def vote(self, number: int, said: str, seconds: float) -> None:
        """Keep what was said of question `number`.

        Raises:
            OutOfTurnError: another question is being asked.
            OSError: it could not be written.
        """
        with self._lock:
            self._expect(number)
            question = self.plan[number]
            self._file.append(self._line(question, question.choice(said), seconds))

    def undo(self, number: int) -> None:
        """Take back the last vote, which was on question `number`.

        Raises:
            OutOfTurnError: the last vote was on another one.
            OSError: it could not be written.
        """
        with self._lock:
            answers = list(self.answers())
            if not answers or answers[-1] != number:
                raise OutOfTurnError("this is not the last vote any more")
            self._file.append(self._line(self.plan[number], "undo", None))

    def video(self, number: int, side: str) -> Candidate:
        """The video on one side of a question.

        Raises:
            IndexError: no such question.
        """
        return self.plan[number].at(side)

    def _expect(self, number: int) -> None:
        question = self.state()["question"]
        if question is None or question["number"] != number:
            raise OutOfTurnError("this pair was rated already, in another window")

    def _shown(self, place: int) -> dict[str, Any]:
        video = self.plan[place].pair.a.sample
        kind = "image" if video.file.suffix == ".png" else "video"
        return {"number": place, "prompt": video.prompt, "kind": kind}

    def _said(self, place: int, vote: Vote) -> dict[str, Any]:
        said: str = vote.vote
        if said in ("a", "b"):
            said = "left" if said == self.plan[place].left else "right"
        return {"number": place, "choice": said}

    def _line(self, question: Question, vote: str, seconds: float | None) -> Vote:
        members = {
            name + end: value
            for end, video in (("_a", question.pair.a), ("_b", question.pair.b))
            for name, value in (
                ("samples", str(video.folder.resolve())),
                ("file", video.sample.file.name),
                ("seed", video.sample.seed),
                ("sha256", video.sha256),
            )
        }
        return Vote.model_validate(
            {
                "rater": self.rater,
                "prompt": question.pair.a.sample.prompt,
                **members,
                "vote": vote,
                "left": question.left,
                "showing": question.showing,
                "seconds": seconds,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )


def check_rater(name: str) -> str:
    """The name without spaces around it.

    Raises:
        UserError: it is empty.
    """
    if not name.strip():
        raise UserError("--rater must be a name: votes are told apart by it")
    return name.strip()
