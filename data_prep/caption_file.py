"""Captions that are already written: a JSONL, CSV or Parquet file keyed by clip_id or path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.caption_config import Answer, Clip, Kind
from data_prep.listing import read_records
from megatron_video.errors import UserError
from megatron_video.files import file_sha256

_KEYS = ("clip_id", "path")


class FileCaptioner:
    """Fields `short` and `dense` (or `caption_short`, `caption_dense`; `caption` where one kind is asked for).

    A clip_id names one clip; a path, relative to the file, names all clips of that source that no clip_id names.
    """

    batch_size = 256
    concurrency = 1
    looks = False

    def __init__(self, file: Path, kinds: Sequence[Kind]) -> None:
        if not file.is_file():
            raise UserError(f"--captions {file}: {'a folder, not a file' if file.is_dir() else 'no such file'}")
        self.name = f"file:{file.name}-{file_sha256(file)[:8]}"
        self._texts: dict[str, dict[str, str]] = {}
        for number, record in enumerate(read_records(file), start=1):
            self._add(file, number, record, kinds)
        self._used: set[str] = set()

    def ask(self, kind: Kind, clips: Sequence[Clip]) -> list[Answer]:
        """What the file has for these clips."""
        return [self._look_up(kind, clip) for clip in clips]

    def figures(self) -> dict[str, int]:
        """Entries that belong to no clip are often a wrong path."""
        return {"entries of the file without a clip": len(self._texts) - len(self._used)}

    def close(self) -> None:
        """Nothing is held."""

    def _look_up(self, kind: Kind, clip: Clip) -> Answer:
        for key in (clip.row["clip_id"], clip.row["source"]):
            if kind in self._texts.get(key, {}):
                self._used.add(key)
                return Answer(self._texts[key][kind])
        return Answer(problem="not in the file")

    def _add(self, file: Path, number: int, record: Any, kinds: Sequence[Kind]) -> None:
        if not isinstance(record, dict) or not any(record.get(key) for key in _KEYS):
            raise UserError(f"{file}: entry {number} has neither clip_id nor path: {str(record)[:80]}")
        named = str(record.get("clip_id") or os.path.abspath(file.parent / str(record["path"])))
        texts = self._texts.setdefault(named, {})
        for kind in kinds:
            value = _value(record, kind, alone=len(kinds) == 1)
            # An empty field is no entry: it becomes "not in the file".
            if value and texts.setdefault(kind, value) != value:
                raise UserError(f"{file}: entry {number} gives {named} another {kind} caption than an earlier entry")


def _value(record: dict[str, Any], kind: Kind, alone: bool) -> str:
    names = (f"caption_{kind}", kind, *(("caption",) if alone else ()))
    return next((str(record[name]).strip() for name in names if record.get(name)), "")
