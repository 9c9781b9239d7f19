"""A run with failures, event by event: what training/effective_time.py would say of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from training.effective_time import WallTime
from training.planner.failures import Recovery


def simulate_run(recovery: Recovery, step: float, steps: int, save_every: int, seed: int) -> WallTime:
    """One run from its first start to its last checkpoint.

    Args:
        recovery: how it fails, restarts and saves.
        step: seconds of a step.
        steps: of the run.
        save_every: steps between saves.
        seed: of the times at which it fails.
    """
    run = _Run(recovery, step, steps, save_every, np.random.default_rng(seed))
    run.plan_events()
    while not run.live():
        pass
    return run.wall_time()


def effective_of(runs: Sequence[WallTime]) -> tuple[float, float]:
    """Effective training time of runs of equal steps: all their steps over all their time, and its standard error."""
    work, totals = runs[0].steps, np.array([run.total for run in runs])
    mean = float(totals.mean())
    error = float(totals.std(ddof=1)) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
    return work / mean, work * error / mean**2


@dataclass
class _Run:
    """A run under way; seconds."""

    recovery: Recovery
    step: float
    steps: int
    save_every: int
    random: np.random.Generator
    clock: float = 0.0
    failure: float = math.inf
    """When the job fails next."""
    stop: float = math.inf
    """From when on it is to be stopped behind a save."""
    saved: int = 0
    """Steps in the newest complete checkpoint."""
    writing: tuple[int, float] | None = None
    """Steps in the one under way, and when it is complete."""
    spent: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("computed", "saves", "startup", "down"), 0.0)
    )
    computed_steps: int = 0

    def plan_events(self) -> None:
        """Draw when the job ends next."""
        self.failure = self.clock + self._draw(self.recovery.between_failures)
        self.stop = self.clock + self._draw(self.recovery.between_stops)

    def live(self) -> bool:
        """From a start to the next end; whether the run is finished."""
        if not self._pass(sum(self.recovery.startup.values()), "startup"):
            return self._fail()
        done = self.saved
        while done < self.steps:
            count = min(self.save_every - done % self.save_every, self.steps - done)
            if not self._compute(count):
                return self._fail()
            done += count
            if not (self._settle() and self._pass(self.recovery.blocked, "saves")):
                return self._fail()
            self.writing = (done, self.clock + self.recovery.lag)
            if self.stop <= self.clock or done == self.steps:
                if not self._settle():
                    return self._fail()
                if done < self.steps:
                    self.stop = self.clock + self._draw(self.recovery.between_stops)
                    return self._come_back(self.recovery.replace)
        return True

    def wall_time(self) -> WallTime:
        """Where the time went, as of a real run's records."""
        kept = self.steps * self.step
        return WallTime(
            total=self.clock,
            steps=kept,
            lost_steps=self.spent["computed"] - kept,
            checkpoints=self.spent["saves"],
            checkups=0.0,
            startup=self.spent["startup"],
            down=self.spent["down"],
            other=0.0,
            lost_step_count=self.computed_steps - self.steps,
            refused_step_count=0,
        )

    def _draw(self, mean: float) -> float:
        return math.inf if math.isinf(mean) else float(self.random.exponential(mean))

    def _pass(self, seconds: float, what: str) -> bool:
        """Let time pass; whether the job lived through it."""
        until = min(self.clock + seconds, self.failure)
        self.spent[what] += until - self.clock
        alive = self.clock + seconds <= self.failure
        self.clock = until
        return alive

    def _compute(self, count: int) -> bool:
        whole = min(count, int((self.failure - self.clock) / self.step)) if self.failure < math.inf else count
        self._pass(whole * self.step, "computed")
        self.computed_steps += whole
        # The step under way leaves no record: its time lies between the last one and the next start.
        return whole == count or self._pass(self.step, "down")

    def _settle(self) -> bool:
        """Wait for the checkpoint under way."""
        if self.writing is None:
            return True
        alive = self._pass(max(0.0, self.writing[1] - self.clock), "saves")
        self._publish()
        return alive

    def _publish(self) -> None:
        if self.writing is not None and self.writing[1] <= self.clock:
            self.saved, self.writing = self.writing[0], None

    def _fail(self) -> bool:
        self._publish()
        self.writing = None
        self.failure = self.clock + self._draw(self.recovery.between_failures)
        return self._come_back(self.recovery.detect + self.recovery.replace)

    def _come_back(self, seconds: float) -> bool:
        """Until the job is started again, however often that fails; not finished."""
        while not self._pass(seconds, "down"):
            self.failure = self.clock + self._draw(self.recovery.between_failures)
            seconds = self.recovery.detect + self.recovery.replace
        return False
