"""What became of every unit of a chain's stage: a file each, written by the job itself.

Exit codes and the accounting of SLURM come and go; these files stay, and say which units have to be done again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_video.files import write_atomically

State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Result:
    """One unit of a stage: a shard of a data stage, or the only one of a job that is no array."""

    unit: int
    state: State
    job: str
    """SLURM's number of the job, of an array that of the task's own job."""
    host: str
    started: float
    """Seconds since the epoch."""
    seconds: float = 0.0
    exit_code: int | None = None
    message: str = ""
    """Last word of a command that failed."""
    log: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    """What the command printed as JSON."""


def result_path(folder: Path, unit: int) -> Path:
    """Where a unit's result is."""
    return folder / f"{unit:06d}.json"


def write_result(folder: Path, result: Result) -> None:
    """Keep a unit's newest result."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n"
    write_atomically(result_path(folder, result.unit), content.encode())


def read_result(folder: Path, unit: int) -> Result | None:
    """The newest result of a unit; None if it was never begun."""
    try:
        values = json.loads(result_path(folder, unit).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Files appear whole, so one that cannot be read is damaged: then the unit is done again, which costs little.
        return None
    return Result(**values)


def read_results(folder: Path, units: int) -> dict[int, Result]:
    """The newest results of those units of 0 ... units - 1 that were begun."""
    found = ((unit, read_result(folder, unit)) for unit in range(units))
    return {unit: result for unit, result in found if result is not None}


def is_done(options: Mapping[str, Any]) -> bool:
    """Whether all units of a chain's job (by its job's options) are done; False for other jobs."""
    if "stage_dir" not in options:
        return False
    folder = Path(options["stage_dir"]) / "results"
    found = [read_result(folder, unit) for task in options["units"] for unit in task]
    return all(result is not None and result.state == "done" for result in found)
