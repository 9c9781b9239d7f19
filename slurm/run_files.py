"""What the folder of a training tells a supervisor that knows nothing of training: checkpoints, steps, signs of life.

Works for a run (`pretrain`, `vae`) and for a folder of runs (`curriculum`), whose stages are one level below.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS_FILE, METRICS_FILE, EVENTS_FILE = "status.json", "metrics.jsonl", "events.jsonl"
# Written last of all files of a checkpoint: of the DiT's folder; of the VAE's, beside its folders.
COMPLETE_FILE = "train_state.json"
_COMPLETE = {"checkpoints": COMPLETE_FILE, "checkpoint": "../../checkpoint.json"}
_STEP = re.compile(r"step_(\d{8,})")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: str
    """Relative to the run's folder."""
    step: int


def newest_checkpoints(run_dir: Path) -> dict[str, Checkpoint]:
    """The newest complete checkpoint of the run or of each of its stages, by the folder that holds them."""
    found: dict[str, Checkpoint] = {}
    for kind, marker in _COMPLETE.items():
        for folder in [*run_dir.glob(f"{kind}/step_*"), *run_dir.glob(f"*/{kind}/step_*")]:
            match, place = _STEP.fullmatch(folder.name), str(folder.parent.relative_to(run_dir))
            if match is None or not (folder / marker).exists():
                continue
            if place not in found or found[place].step < int(match[1]):
                found[place] = Checkpoint(str(folder.relative_to(run_dir)), int(match[1]))
    return found


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The one that was written last: of a curriculum, that of the stage under way."""
    found = newest_checkpoints(run_dir).values()
    return max(found, key=lambda checkpoint: _written(run_dir / checkpoint.folder), default=None)


def has_progressed(before: dict[str, int], now: dict[str, int]) -> bool:
    """Whether a newer checkpoint is complete: `step` by place, as `checkpoint_steps` has it."""
    return any(step > before.get(place, -1) for place, step in now.items())


def checkpoint_steps(run_dir: Path) -> dict[str, int]:
    """Step of the newest complete checkpoint, by place."""
    return {place: checkpoint.step for place, checkpoint in newest_checkpoints(run_dir).items()}


def last_step(run_dir: Path) -> int | None:
    """Last step that metrics.jsonl has; of a curriculum, of the stage under way."""
    newest = max(_life_files(run_dir, METRICS_FILE), key=lambda path: path.stat().st_mtime, default=None)
    steps = [] if newest is None else [line["step"] for line in tail_lines(newest) if "step" in line]
    return int(steps[-1]) if steps else None


def tail_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects at the end of a file of lines; what is torn is left out."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().splitlines()
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_status(run_dir: Path) -> dict[str, Any]:
    """The status.json written last, of the run or of a stage; empty where there is none."""
    newest = max(_life_files(run_dir, STATUS_FILE), key=lambda path: path.stat().st_mtime, default=None)
    try:
        value = json.loads(newest.read_text(encoding="utf-8")) if newest else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Marks:
    """Sizes and times of files, to know later which of them changed. Never compared with a clock: a file server has
    its own."""

    values: dict[str, tuple[int, int]]

    @staticmethod
    def of_run(run_dir: Path) -> Marks:
        """Of everything that a training adds to while it lives."""
        return Marks.of([path for name in _LIFE_FILES for path in _life_files(run_dir, name)])

    @staticmethod
    def of(paths: list[Path]) -> Marks:
        """Of some files; those that are gone have none."""
        values = {}
        for path in paths:
            try:
                found = path.stat()
            except OSError:
                continue
            values[str(path)] = (found.st_mtime_ns, found.st_size)
        return Marks(values)

    def changed_since(self, earlier: Marks, name: str) -> bool:
        """Whether a file of this name is new, or is not as it was."""
        return any(value != earlier.values.get(path) for path, value in self.values.items() if Path(path).name == name)


_LIFE_FILES = (METRICS_FILE, STATUS_FILE, EVENTS_FILE)


def new_events(run_dir: Path, kind: str, since: float) -> list[dict[str, Any]]:
    """Events of a kind at or after a Unix time, oldest first."""
    from datetime import datetime

    files = _life_files(run_dir, EVENTS_FILE)
    lines = [line for path in files for line in tail_lines(path) if line.get("event") == kind]
    recent = [line for line in lines if datetime.fromisoformat(line["time"]).timestamp() >= since]
    return sorted(recent, key=lambda line: str(line["time"]))


def _life_files(run_dir: Path, name: str) -> list[Path]:
    return [path for path in [run_dir / name, *run_dir.glob(f"*/{name}")] if path.exists()]


def _written(folder: Path) -> float:
    return folder.stat().st_mtime
