"""Configuration of what a run does about faults: its end, hangs, spikes, slow ranks."""

from __future__ import annotations

import os
import time
from typing import Literal

from megatron_video.config_io import config_dataclass
from megatron_video.errors import UserError

END_TIME_VARIABLE = "SLURM_JOB_END_TIME"


@config_dataclass
class FaultConfig:
    """How a run ends in time, and how it meets what goes wrong."""

    wall_time: float | Literal["auto"] | None = "auto"
    """Minutes from the start of this process after which the job is killed: it saves and leaves in time, with the exit
    code of a requeue. `auto` reads the end from the variable SLURM_JOB_END_TIME where it is set; null: no limit."""
    wall_time_reserve: float = 120.0
    """Seconds kept free for the last save until one was measured; from then on at least twice the slowest save."""
    hang_seconds: float | None = 600.0
    """Longest time that a part of a step (waiting for data, forward and backward, a reduction, the update) may take;
    then the stuck rank is named, stacks are written to <run>/hangs/ and the job ends with exit code 75. Null: no
    watchdog, other than the 30 minutes after which torch.distributed gives up a collective."""
    hang_seconds_start: float = 3600.0
    """The same for building and loading the model and for the first step, which compiles."""
    hang_seconds_checkpoint: float = 3600.0
    """The same for writing a checkpoint."""
    hang_seconds_validation: float = 3600.0
    """The same for a validation."""

    def __post_init__(self) -> None:
        """Refuse times that mean nothing.

        Raises:
            ValueError: naming the field and the value.
        """
        if isinstance(self.wall_time, float) and self.wall_time <= 0:
            raise ValueError(f"wall_time={self.wall_time} must be above 0 minutes, 'auto' or null")
        if self.wall_time_reserve < 0:
            raise ValueError(f"wall_time_reserve={self.wall_time_reserve} must not be negative")
        for name in ("hang_seconds", "hang_seconds_start", "hang_seconds_checkpoint", "hang_seconds_validation"):
            seconds = getattr(self, name)
            if seconds is not None and seconds <= 0:
                raise ValueError(f"{name}={seconds} must be above 0")

    def deadline(self) -> float | None:
        """Unix time at which the job is killed, or None.

        Raises:
            UserError: the scheduler's variable holds no time.
        """
        if isinstance(self.wall_time, float):
            return time.time() + 60 * self.wall_time
        text = os.environ.get(END_TIME_VARIABLE)
        if self.wall_time is None or not text:
            return None
        try:
            return float(text)
        except ValueError:
            raise UserError(
                f"{END_TIME_VARIABLE}={text!r} is no Unix time; unset it, or set faults.wall_time to minutes or null"
            ) from None

    def hang_limit(self, phase: str, is_first_step: bool) -> float:
        """Seconds that a phase may take, for a run with a watchdog."""
        assert self.hang_seconds is not None
        own = {"checkpoint": self.hang_seconds_checkpoint, "validation": self.hang_seconds_validation}
        usual = max(self.hang_seconds, self.hang_seconds_start) if is_first_step else self.hang_seconds
        return own.get(phase, usual)

    @property
    def hang_grace_seconds(self) -> float:
        """What ranks wait for each other's reports."""
        return min(max((self.hang_seconds or 0) / 10, 3.0), 30.0)

    @property
    def hang_poll_seconds(self) -> float:
        """How often a rank looks at its heartbeat and for the alarm of others."""
        return self.hang_grace_seconds / 5
