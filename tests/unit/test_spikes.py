"""Data windows that are left out, spikes, and what is done about them, as functions of state and figures."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from megatron_video.errors import UserError
from training.checkpoint import TrainState
from training.fault_config import FaultConfig
from training.skipped_data import add_windows, data_step
from training.spikes import Rollback, note_step, plan_rollback, recent_rollbacks, spike_limit
from training.train_step import StepResult

CONFIG = FaultConfig(spike_mads=6.0, spike_ratio=1.2, spike_window=20, spike_steps=3)


def result(loss: float, grad_norm: float = 1.0) -> StepResult:
    return StepResult(loss, grad_norm, not math.isfinite(loss), None, [], [])


def feed(state: TrainState, losses: list[float], config: FaultConfig = CONFIG) -> list[bool]:
    """Train on these losses; which of the steps were spikes."""
    found = []
    for loss in losses:
        state.step += 1
        found.append(note_step(state, result(loss), config) is not None)
    return found


def usual(count: int, seed: int = 0) -> list[float]:
    return [random.Random(f"{seed}/{index}").gauss(2.0, 0.05) for index in range(count)]


@pytest.mark.parametrize("skipped", [[], [[3, 5]], [[0, 2], [2, 4], [9, 10]], [[8, 9], [1, 6], [4, 7]]])
def test_the_data_of_all_steps_is_all_data_but_the_windows_in_order(skipped: list[list[int]]) -> None:
    left = [step for step in range(40) if not any(first <= step < end for first, end in skipped)]
    assert [data_step(step, skipped) for step in range(20)] == left[:20]


def test_windows_are_added_only_before_their_data_is_reached() -> None:
    assert add_windows([(10, 12)], [[2, 4]], step=8) == [[2, 4], [10, 12]]
    # Named again after a resume: nothing happens.
    assert add_windows([(2, 4)], [[2, 4]], step=8) == [[2, 4]]
    with pytest.raises(UserError, match=r"\[9, 12\] begins before data step 10"):
        add_windows([(9, 12)], [[2, 4]], step=8)


def test_nothing_is_a_spike_without_a_limit_or_before_the_window_is_full() -> None:
    state = TrainState()
    assert feed(state, [*usual(19), 100.0]) == [False] * 20
    assert feed(TrainState(), [*usual(30), 100.0], replace(CONFIG, spike_mads=None)) == [False] * 31
    assert TrainState() == replace(TrainState(), usual_steps=[])


def test_values_far_above_the_usual_range_are_spikes_and_do_not_widen_it() -> None:
    state = TrainState()
    found = feed(state, [*usual(30), 2.2, 4.0, math.nan, 4.0, 2.0])
    assert found == [False] * 31 + [True, True, True, False]
    assert state.spikes_in_a_row == 0
    assert max(loss for loss, _ in state.usual_steps) == 2.2
    assert len(state.usual_steps) == CONFIG.spike_window


def test_the_limit_is_robust_and_never_near_a_flat_curve() -> None:
    assert spike_limit([1.0] * 10 + [50.0], CONFIG) == pytest.approx(1.2)
    # Standard deviation of a normal distribution: 0.05, of which the median absolute deviation is 0.6745.
    assert spike_limit(usual(5000), CONFIG) == pytest.approx(max(2 + 6 * 0.05, 2.4), rel=0.01)


@pytest.mark.parametrize(("measure", "is_spike"), [("loss", False), ("grad_norm", True), ("either", True)])
def test_the_measure_that_was_asked_for_is_compared(measure: str, is_spike: bool) -> None:
    config, state = replace(CONFIG, spike_measure=measure), TrainState()
    for loss in usual(25):
        note_step(state, result(loss, grad_norm=loss / 2), config)
    assert (note_step(state, result(2.0, grad_norm=7.0), config) is not None) == is_spike


def test_as_many_spikes_in_a_row_as_asked_for_call_for_a_rollback_to_before_the_first() -> None:
    state = TrainState(skipped_data=[[5, 8]])
    feed(state, [*usual(30), 9.0, 9.0])
    assert plan_rollback(state, CONFIG) is None
    feed(state, [9.0])
    # Steps 31 to 33 used data steps 33 to 35.
    assert plan_rollback(state, CONFIG) == Rollback(30, (33, 36))
    assert plan_rollback(state, replace(CONFIG, spike_back=4)) == Rollback(26, (29, 36))


def test_rollbacks_are_counted_over_the_last_steps_alone() -> None:
    state = TrainState(step=1000, rollbacks=[10, 900, 950])
    assert recent_rollbacks(state, replace(CONFIG, spike_max_rollbacks_in=100)) == 1
    assert recent_rollbacks(state, replace(CONFIG, spike_max_rollbacks_in=101)) == 2
    assert recent_rollbacks(state, CONFIG) == 3
