"""Answers as they come, one JSON line each: what a killed caption run does not have to ask (and pay) for again."""

from __future__ import annotations

import glob
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from data_prep.caption_config import Answer, Kind
from data_prep.workers import Shard

Key = tuple[str, str]
"""clip_id, kind."""


def read_answers(manifest_out: Path, source: str) -> dict[Key, Answer]:
    """All answers of this source for an output, of all shares of it."""
    answers: dict[Key, Answer] = {}
    for path in _files(manifest_out):
        answers |= _read(path, source)[0]
    return answers


def remove_journals(manifest_out: Path) -> None:
    """The answers are in the manifest now; only under the lock of the whole output."""
    for path in _files(manifest_out):
        path.unlink()


class Journal:
    """Append-only file of one run or one share; another source's answers are thrown away when it is opened."""

    def __init__(self, manifest_out: Path, source: str, shard: Shard | None = None) -> None:
        share = f".{shard.index}-of-{shard.count}" if shard else ""
        path = manifest_out.with_name(f".{manifest_out.name}.answers{share}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        _, intact = _read(path, source)
        # Others' answers too: a run in one go takes up what the tasks of an array had.
        self.answers = read_answers(manifest_out, source)
        # Cut to what is whole, or the next line would be glued to the half that a kill left.
        with open(path, "ab") as file:
            file.truncate(intact)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._lock = threading.Lock()
        if not intact:
            self._write({"source": source})

    def add(self, clip_id: str, kind: Kind, answer: Answer) -> None:
        """Keep an answer; one that may come later is not written, so that the next run asks again."""
        with self._lock:
            self.answers[clip_id, kind] = answer
            if not answer.again:
                self._write({"clip_id": clip_id, "kind": kind, **asdict(answer)})

    def close(self) -> None:
        """Nothing is lost if this is never reached."""
        self._file.close()

    def _write(self, entry: Mapping[str, object]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        # To the operating system at once: it outlives a kill of this process.
        self._file.flush()


def _files(manifest_out: Path) -> list[Path]:
    return sorted(manifest_out.parent.glob(f".{glob.escape(manifest_out.name)}.answers*.jsonl"))


def _read(path: Path, source: str) -> tuple[dict[Key, Answer], int]:
    """Whole entries made with `source`, and how many bytes they take; none if the file is of another source."""
    answers: dict[Key, Answer] = {}
    intact = 0
    if not path.is_file() or not os.path.getsize(path):
        return answers, intact
    with open(path, "rb") as file:
        if _entry(file.readline()) != {"source": source}:
            return answers, intact
        intact = file.tell()
        for line in file:
            entry = _entry(line)
            if entry is None:
                break
            intact += len(line)
            key = str(entry.pop("clip_id")), str(entry.pop("kind"))
            answers[key] = Answer(**entry)  # type: ignore[arg-type]
    return answers, intact


def _entry(line: bytes) -> dict[str, object] | None:
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
