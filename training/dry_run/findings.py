"""What a dry run found, all of it together: problems, what was not looked at, and what is good to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from megatron_video.errors import UserError

Verdict = Literal["ok", "refused", "not checked"]


@dataclass
class Findings:
    """Of one run, or of one stage of several."""

    stage: str | None = None
    """Stage of a curriculum that they are about."""
    problems: list[str] = field(default_factory=list)
    """Why the job could not run."""
    not_checked: list[str] = field(default_factory=list)
    """What nobody looked at, and why."""
    notes: list[str] = field(default_factory=list)
    """What does not hinder."""
    checks: dict[str, Verdict] = field(default_factory=dict)
    """Verdict by check, in the order in which they were made."""

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """A check, or a part of it: what it refuses becomes a problem, and the next one goes on."""
        self.checks.setdefault(name, "ok")
        try:
            yield
        except UserError as error:
            self.refuse(name, str(error))
        except OSError as error:
            self.refuse(name, f"{error.filename or ''}: {error.strerror or error}")

    def refuse(self, name: str, reason: str) -> None:
        """Note a problem."""
        self.checks[name] = "refused"
        self.problems.append(f"{self._of_stage}{name}: {reason}")

    def leave_out(self, name: str, why: str) -> None:
        """Note that something is not looked at."""
        self.pass_over(name)
        self.not_checked.append(f"{self._of_stage}{name}: {why}")

    def pass_over(self, name: str) -> None:
        """Note that a check is not made here; why is said once, for all stages."""
        self.checks.setdefault(name, "not checked")

    def note(self, text: str) -> None:
        """Note what is good to know."""
        self.notes.append(f"{self._of_stage}{text}")

    def passed(self, name: str) -> bool:
        """Whether a check was made and refused nothing."""
        return self.checks.get(name) == "ok"

    @property
    def _of_stage(self) -> str:
        return f"stage {self.stage!r}: " if self.stage is not None else ""
