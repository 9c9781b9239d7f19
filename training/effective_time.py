"""Where a run's wall time went, and its effective training time (Step-Video-T2V, arXiv 2502.10248, 6.1).

The paper: Effective Training Time = Total Iteration Time / Total Training Time. What is counted here:

- Total training time is wall time from the first start of the job to its last record, all lives and the gaps between
  them: queueing, repair and restart are in it. A run whose status says `running` is counted up to its last record.
- Total iteration time is the sum of `step_seconds` of the steps whose work is in the weights. Waiting for data is part
  of a step. A step that a kill or a rollback undid counts as lost, also if it was done again later: then the second
  time counts. A step whose update was refused (non-finite values) counts, as its data is consumed; the report names
  how many there were.
- Time that checkpoints, validation and samples hold training up is outside of steps and so not effective.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.run_records import RunRecords, seconds_of


@dataclass(frozen=True)
class Life:
    """One start of the job."""

    number: int
    started: float
    """Seconds since 1970."""
    first_record: float
    """When its first step began; `ended` if it did none."""
    ended: float
    """Its last record."""
    first_step: int
    """Steps done before it."""
    last_step: int
    """Steps done at its end."""
    world_size: int
    end_reason: str
    """What it said at its end; empty if it could not."""


@dataclass(frozen=True)
class WallTime:
    """Seconds by what they went to; they add up to `total`."""

    total: float
    steps: float
    """Steps whose work is in the weights: total iteration time."""
    lost_steps: float
    """Steps that were undone."""
    checkpoints: float
    """Training held up by saves."""
    checkups: float
    """Validation and sample videos."""
    startup: float
    """From the start of a life to its first step."""
    down: float
    """Between the last record of a life and the next start."""
    other: float
    """What remains: telemetry between steps, the end of a life, and what records do not tell."""
    lost_step_count: int
    refused_step_count: int

    @property
    def effective(self) -> float:
        """Effective training time, 0 to 1."""
        return self.steps / self.total if self.total else 0.0

    def parts(self) -> dict[str, float]:
        """Seconds by name, of everything that `total` consists of."""
        return {
            "steps in the weights": self.steps,
            "steps lost": self.lost_steps,
            "checkpoints": self.checkpoints,
            "validation and samples": self.checkups,
            "start-up": self.startup,
            "down": self.down,
            "other": self.other,
        }


def find_lives(records: RunRecords) -> list[Life]:
    """The starts of the job with what their records tell of them."""
    return [_life(records, info) for info in records.lives]


def wall_time(records: RunRecords) -> WallTime:
    """Add up where the time of all lives went."""
    steps, lives = records.steps, find_lives(records)
    seconds = steps["step_seconds"]
    total = lives[-1].ended - lives[0].started
    spent = {
        "steps": float(seconds[steps.kept].sum()),
        "lost_steps": float(seconds[~steps.kept].sum()),
        "checkpoints": sum(held_up(event) for event in records.events_of("save")),
        "checkups": sum(event["seconds"] for event in records.events_of("validation", "samples")),
        "startup": sum(life.first_record - life.started for life in lives),
        "down": sum(max(later.started - life.ended, 0) for life, later in itertools.pairwise(lives)),
    }
    return WallTime(
        total=total,
        **spent,
        # Starts are known to the second only, so what remains may come out a little below zero.
        other=max(total - sum(spent.values()), 0.0),
        lost_step_count=int((~steps.kept).sum()),
        refused_step_count=int(np.nansum(steps["refused"][steps.kept])),
    )


def held_up(save: dict[str, Any]) -> float:
    """Seconds that training waited for a save, and before it for the one under way."""
    return float(save["blocked_seconds"] + save.get("waited_seconds", 0.0))


def _life(records: RunRecords, info: dict[str, object]) -> Life:
    number, started = int(str(info["life"])), seconds_of(str(info["started"]))
    mine = records.steps["life"] == number
    times, steps = records.steps["time"][mine], records.steps["step"][mine]
    events = [event for event in records.events if event["life"] == number]
    moments = [started, *(seconds_of(event["time"]) for event in events), *times]
    first_step = int(str(info["first_step"]))
    first = float(times[0] - records.steps["step_seconds"][mine][0]) if len(times) else max(moments)
    return Life(
        number=number,
        started=started,
        first_record=max(first, started),
        ended=max(moments),
        first_step=first_step,
        last_step=int(steps[-1]) if len(steps) else first_step,
        world_size=int(str(info["world_size"])),
        end_reason=next((f"{e['state']}: {e['reason']}" for e in reversed(events) if e["event"] == "stop"), ""),
    )
