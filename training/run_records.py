"""What a run's folder tells of it, read while it goes on or long after: metrics, events, lives, configuration."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_video.errors import UserError
from training.events import read_events
from training.time_bins import TIME_BINS

GIB = 2.0**30

METRICS_FILE, LIVES_FILE, STATUS_FILE, CONFIG_FILE = "metrics.jsonl", "run_info.json", "status.json", "config.yaml"
Floats = npt.NDArray[np.float64]
NUMBERS = (
    "step",
    "life",
    "time",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "data_seconds",
    "samples",
    "tokens",
    "flops",
    "refused",
)


@dataclass(frozen=True)
class StepTable:
    """Lines of metrics.jsonl as columns, in the order they were written."""

    columns: Mapping[str, Floats]
    """NUMBERS by name, [n]."""
    loss_by_time: Floats
    """[n, TIME_BINS], NaN where a step had no sample there."""
    positions_by_time: Floats
    """[n, TIME_BINS]"""
    kept: npt.NDArray[np.bool_]
    """[n]: the step's work is in the weights; false for steps whose work was lost and that had to be done again."""
    memory: list[tuple[int, dict[str, float]]]
    """(step, bytes by name), from the kept lines that have it."""
    layer_norms: list[tuple[int, dict[str, dict[str, float]]]]
    """(step, kind -> part of the model -> size), from the kept lines that have them."""

    def __len__(self) -> int:
        """Number of lines."""
        return len(self.kept)

    def __getitem__(self, name: str) -> Floats:
        """One column."""
        return self.columns[name]

    def kept_column(self, name: str) -> Floats:
        """One column of the steps whose work is in the weights: steps rise by one."""
        column: Floats = self.columns[name][self.kept]
        return column


@dataclass(frozen=True)
class RunRecords:
    """All records of one run."""

    folder: Path
    status: dict[str, Any]
    """state and step, as the last life left them."""
    lives: list[dict[str, Any]]
    """Starts of the job, oldest first."""
    config: dict[str, Any]
    events: list[dict[str, Any]]
    steps: StepTable

    def events_of(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of some kinds, oldest first."""
        return [event for event in self.events if event["event"] in kinds]

    def kept_events_of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind about weights that were not undone: of a step that came again, the last one."""
        found = self.events_of(kind)
        kept = kept_steps(np.array([event["step"] for event in found], dtype=np.float64))
        return [event for event, stays in zip(found, kept, strict=True) if stays]

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all devices of the newest life together; None where training.peak_tflops says nothing."""
        peak = self.config.get("training", {}).get("peak_tflops")
        return None if peak is None else peak * 1e12 * self.lives[-1]["world_size"]

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return int(self.config["training"]["steps"])


def read_run(folder: Path) -> RunRecords:
    """Read the records of a run.

    Raises:
        UserError: the folder holds no run, one that has not done a step yet, or one of an older version.
    """
    lives = read_lives(folder)
    table = step_table(metric_lines(folder / METRICS_FILE), {life["life"]: life["first_step"] for life in lives})
    if not len(table):
        raise UserError(f"{folder} is a run that has not done a step yet; {STATUS_FILE} says {read_status(folder)}")
    return RunRecords(folder, read_status(folder), read_lives(folder), read_config(folder), read_events(folder), table)


def read_lives(folder: Path) -> list[dict[str, Any]]:
    """Starts of the job.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        lives: list[dict[str, Any]] = json.loads((folder / LIVES_FILE).read_text(encoding="utf-8"))["lives"]
    except OSError:
        raise UserError(f"{folder} holds no run (no {LIVES_FILE}); give the folder named by run.output_dir") from None
    return lives


def read_status(folder: Path) -> dict[str, Any]:
    """State and step of the newest life; `unknown` where it left none."""
    try:
        status: dict[str, Any] = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except OSError:
        return {"state": "unknown", "step": 0}
    return status


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the newest life."""
    values: dict[str, Any] = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return values


def metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl in order; those torn by a kill are left out."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from parsed_lines(file)


def parsed_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of `lines`; what is none, such as a line torn by a kill, is left out.

    Raises:
        UserError: lines of an older version, which did not tell times.
    """
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "step" in values:
            if "time" not in values:
                raise UserError(
                    f"{METRICS_FILE} has lines without a time: an older version wrote them, and `watch` and `report` "
                    "cannot read them; start the run in a new folder, or train with that version to its end"
                )
            yield values


def step_table(lines: Iterable[dict[str, Any]], first_steps: Mapping[int, int]) -> StepTable:
    """Columns of `lines`.

    Args:
        lines: of metrics.jsonl, in order.
        first_steps: steps done before each life.
    """
    # Packed, as a run of months has a million lines.
    rows, losses, positions = array("d"), array("d"), array("d")
    memory, norms = [], []
    nan = float("nan")
    for number, line in enumerate(lines):
        rows.extend([line.get(name, nan) for name in NUMBERS])
        losses.extend([nan if loss is None else loss for loss in line["loss_by_time"]])
        positions.extend(line["positions_by_time"])
        if "memory" in line:
            memory.append((number, line["memory"]))
        if "layer_norms" in line:
            norms.append((number, line["layer_norms"]))
    columns = dict(zip(NUMBERS, np.asarray(rows).reshape(-1, len(NUMBERS)).T, strict=True))
    by_time, counts = (np.asarray(values).reshape(-1, TIME_BINS) for values in (losses, positions))
    kept = kept_steps(columns["step"])
    # A life that has not come to its first step yet has thrown away what came after its checkpoint all the same.
    for life, first in first_steps.items():
        kept &= ~((columns["life"] < life) & (columns["step"] > first))
    seldom = [[(int(columns["step"][row]), value) for row, value in found if kept[row]] for found in (memory, norms)]
    return StepTable(columns, by_time, counts, kept, *seldom)


def kept_steps(steps: Floats) -> npt.NDArray[np.bool_]:
    """Which lines' work is in the weights: when a step number comes again, what was done from it on had been lost.

    Args:
        steps: [n] numbers of the steps in the order in which they were done, by all lives.

    Returns:
        [n]; the steps of those that are kept rise.
    """
    # From the end: a line is lost if a later one has its number or a lower one.
    lowest_after = np.minimum.accumulate(steps[::-1])[::-1]
    return np.append(steps[:-1] < lowest_after[1:], True) if len(steps) else np.zeros(0, dtype=bool)


def seconds_of(moment: str) -> float:
    """Seconds since 1970 of a time as run_info.json and events.jsonl hold it."""
    return datetime.fromisoformat(moment).timestamp()
