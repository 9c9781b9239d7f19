"""The end of a run's records, kept up to date: what `megatron-video watch` shows."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from training.events import EVENTS_FILE
from training.run_records import METRICS_FILE, parsed_lines, read_config, read_lives, read_status

# About 5,000 steps.
_FIRST_READING = 4 << 20
_STEPS_KEPT = 5000


class RunTail:
    """The newest records of one run.

    Args:
        folder: the run's.

    Raises:
        UserError: the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: deque[dict[str, Any]] = deque(maxlen=_STEPS_KEPT)
        """Lines of metrics.jsonl whose work is in the weights, oldest first."""
        self.memory: dict[str, float] = {}
        """Bytes, as measured last."""
        self.events: list[dict[str, Any]] = []
        self.status: dict[str, Any] = {}
        self.lives = read_lives(folder)
        self.config: dict[str, Any] = {}
        self._metrics = _Tail(folder / METRICS_FILE, _FIRST_READING)
        # Events are few, and all of them count.
        self._events = _Tail(folder / EVENTS_FILE, None)

    def read(self) -> None:
        """Take in what is new."""
        self.status, self.lives, self.config = (
            read_status(self.folder),
            read_lives(self.folder),
            read_config(self.folder),
        )
        for line in parsed_lines(self._metrics.new_lines()):
            self._add(line)
        self.events += parsed_lines(self._events.new_lines())

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of some kinds, oldest first."""
        return [event for event in self.events if event["event"] in kinds]

    def silence(self) -> float | None:
        """Seconds since the last step was done; None before the first."""
        return time.time() - self.steps[-1]["time"] if self.steps else None

    def _add(self, line: dict[str, Any]) -> None:
        # What a kill or a rollback undid is done again under the same numbers.
        while self.steps and self.steps[-1]["step"] >= line["step"]:
            self.steps.pop()
        self.steps.append(line)
        self.memory = line.get("memory", self.memory)


class _Tail:
    """Lines that a growing file has gained.

    Args:
        path: the file, which need not be there yet.
        first: bytes read at the first time; None for all.
    """

    def __init__(self, path: Path, first: int | None) -> None:
        self._path, self._first = path, first
        self._position: int | None = None

    def new_lines(self) -> list[str]:
        """Whole lines since the last call; a line that is being written comes next time."""
        if not self._path.exists():
            return []
        size = self._path.stat().st_size
        if self._position is None:
            self._position = 0 if self._first is None else max(size - self._first, 0)
        with self._path.open("rb") as file:
            file.seek(self._position)
            content = file.read(size - self._position)
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        # The first line of a part may be half a line; it is no JSON then, and left out.
        return whole.decode("utf-8", errors="replace").splitlines()
