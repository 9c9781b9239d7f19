"""Configuration of what a run does about faults: its end, hangs, spikes, slow ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import field
from datetime import datetime
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
    resiliency_ext: bool | Literal["auto"] = "auto"
    """Whether ranks report their sections (setup, step, checkpointing, validation) to the rank monitor of
    nvidia-resiliency-ext: `auto` where its ft_launcher started them, true to insist on it."""
    spike_mads: float | None = None
    """A step is a spike if its loss is this many robust standard deviations (1.4826 times the median absolute
    deviation) above the median of the last spike_window usual steps; a loss that is not finite always is. Null: spikes
    are not looked for."""
    spike_ratio: float = 1.5
    """... and also this many times the median."""
    spike_window: int = 100
    """Usual steps that are compared with; nothing is a spike before there are so many."""
    spike_measure: Literal["loss", "grad_norm", "either"] = "loss"
    """What is compared: the loss, the gradient norm, or each by itself."""
    spike_steps: int = 3
    """Spikes in a row after which the run goes back to a checkpoint from before them and leaves their data out."""
    spike_back: int = 0
    """Steps before the first spike whose data is left out too; the checkpoint lies before them. Keep it, and
    training.save_every, below what keep_checkpoints covers."""
    spike_max_rollbacks: int = 3
    """Rollbacks that are made ..."""
    spike_max_rollbacks_in: int = 10_000
    """... in this many steps; one more stops the run with exit code 3."""
    skip_data_steps: list[tuple[int, int]] = field(default_factory=list)
    """Windows [first, end) of data steps, counted from 0, to leave out from now on; they may lie only in data that the
    run has not reached. What was left out stays so without being named again."""
    straggler_every: int | None = 100
    """Steps between two comparisons of the ranks' times (one small collective); null: none."""
    straggler_ratio: float = 1.3
    """A rank is named as slow if its own work (waiting for data, or forward and backward up to the first collective
    with other replicas) takes this many times as long as the median of its peers ..."""
    straggler_share: float = 0.05
    """... and this share of a step longer."""

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
        self._check_spikes()
        self._check_stragglers()

    def _check_stragglers(self) -> None:
        if self.straggler_every is not None and self.straggler_every < 1:
            raise ValueError(f"straggler_every={self.straggler_every} must be at least 1, or null")
        if self.straggler_ratio <= 1:
            raise ValueError(f"straggler_ratio={self.straggler_ratio} must be above 1")
        if self.straggler_share < 0:
            raise ValueError(f"straggler_share={self.straggler_share} must not be negative")

    def _check_spikes(self) -> None:
        for name in ("spike_window", "spike_steps", "spike_max_rollbacks_in"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("spike_back", "spike_max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.spike_mads is not None and self.spike_mads <= 0:
            raise ValueError(f"spike_mads={self.spike_mads} must be above 0, or null")
        if self.spike_ratio < 1:
            raise ValueError(f"spike_ratio={self.spike_ratio} must be at least 1")
        for first, end in self.skip_data_steps:
            if not 0 <= first < end:
                raise ValueError(
                    f"skip_data_steps=[{first}, {end}] must be a window [first, end) with 0 <= first < end"
                )

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


def describe_limits(config: FaultConfig, deadline: float | None) -> Iterator[str]:
    """Lines for the start of a run: when it ends by itself, and what it looks for."""
    if deadline is None:
        yield "wall time: no limit known"
    else:
        at, left = datetime.fromtimestamp(deadline), deadline - time.time()
        yield f"wall time: the job ends at {at:%Y-%m-%d %H:%M:%S}, in {left / 60:.1f} minutes; the run saves before"
    hang = "off" if config.hang_seconds is None else f"{config.hang_seconds:g} s without progress"
    spikes = "off" if config.spike_mads is None else f"{config.spike_steps} steps in a row"
    slow = "off" if config.straggler_every is None else f"every {config.straggler_every} steps"
    yield f"faults: hangs {hang}; spikes {spikes}; slow ranks {slow}"
