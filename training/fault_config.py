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

    def __post_init__(self) -> None:
        """Refuse times that mean nothing.

        Raises:
            ValueError: naming the field and the value.
        """
        if isinstance(self.wall_time, float) and self.wall_time <= 0:
            raise ValueError(f"wall_time={self.wall_time} must be above 0 minutes, 'auto' or null")
        if self.wall_time_reserve < 0:
            raise ValueError(f"wall_time_reserve={self.wall_time_reserve} must not be negative")

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
