"""When a job asks to be stopped: signals, and the end of its time."""

from __future__ import annotations

import os
import signal
import time

import pytest

from megatron_video.errors import UserError
from training.fault_config import FaultConfig
from training.stop_signal import STOP_REASONS, StopSignal

WALL_TIME = STOP_REASONS.index("wall time")


def test_a_signal_is_remembered_and_the_handler_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignal() as stop:
        assert not any(stop.flags())
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.flags()[STOP_REASONS.index("signal")]
        assert not stop.flags()[WALL_TIME]
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("seconds_left", "reserve", "saves", "late"),
    [
        (100, 50, [], False),
        (40, 50, [], True),
        # A save was measured: twice its time, the slowest of them.
        (100, 10, [5, 60, 20], True),
        (130, 10, [5, 60, 20], False),
        # ... but never less than the reserve.
        (40, 50, [1], True),
    ],
)
def test_the_end_comes_early_enough_for_a_save(
    seconds_left: float, reserve: float, saves: list[float], late: bool
) -> None:
    stop = StopSignal(time.time() + seconds_left, reserve)
    for seconds in saves:
        stop.saw_save(seconds)
    assert stop.flags()[WALL_TIME] == late


def test_two_more_steps_fit_and_the_first_step_of_a_life_is_not_taken_for_one_of_them() -> None:
    stop = StopSignal(time.time() + 1000, 0)
    for seconds in (0.5, 0.1, 0.1):
        time.sleep(seconds)
        stop.flags()
    assert 0.2 <= stop.seconds_needed < 0.9


def test_the_end_of_the_job_is_read_from_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert FaultConfig().deadline() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert FaultConfig().deadline() == 1_800_000_000
    assert FaultConfig(wall_time=None).deadline() is None
    assert FaultConfig(wall_time=2).deadline() == pytest.approx(time.time() + 120, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "2027-01-01")
    with pytest.raises(UserError, match="is no Unix time"):
        FaultConfig().deadline()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wall_time": 0.0}, "wall_time=0.0"),
        ({"hang_seconds": 0}, "hang_seconds=0"),
        ({"spike_mads": -1}, "spike_mads=-1"),
        ({"spike_ratio": 0.5}, "spike_ratio=0.5"),
        ({"straggler_ratio": 1.0}, "straggler_ratio=1.0"),
        ({"skip_data_steps": [(4, 4)]}, r"skip_data_steps=\[4, 4\]"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultConfig(**values)  # type: ignore[arg-type]
