"""Loss spikes: when a few steps in a row lie far above the usual range, the run goes back and leaves their data out.

Going back some way before a spike and training on other data is what PaLM did by hand (arXiv 2204.02311, section 5.1):
the same data met from other weights made no spike, so a spike belongs to the pair of both. Every decision here is a
function of figures that the step's reduction has made equal on all ranks, and of the training state, so all ranks take
it alike and a resumed run takes it again.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from training.checkpoint import TrainState
from training.fault_config import FaultConfig
from training.skipped_data import data_step
from training.train_step import StepResult

# A normal distribution's standard deviation in units of its median absolute deviation.
_MAD_TO_SIGMA = 1.4826
MEASURES = ("loss", "grad_norm")


@dataclass(frozen=True)
class Spike:
    """A step above the usual range."""

    measure: str
    """`loss` or `grad_norm`."""
    value: float
    limit: float


@dataclass(frozen=True)
class Rollback:
    """Where to go back to, and what to leave out then."""

    to_step: int
    """The checkpoint has at most so many steps."""
    skipped: tuple[int, int]
    """Data steps [first, end)."""


def note_step(state: TrainState, result: StepResult, config: FaultConfig) -> Spike | None:
    """Compare the step just counted with those before it, and remember it; None if it is in the usual range."""
    if config.spike_mads is None:
        return None
    spike = find_spike(state.usual_steps, result, config)
    state.spikes_in_a_row = state.spikes_in_a_row + 1 if spike else 0
    # Steps of a spike do not make the range that later ones are compared with.
    if spike is None and not result.refused:
        state.usual_steps = [*state.usual_steps, [result.loss, result.grad_norm]][-config.spike_window :]
    return spike


def find_spike(usual: list[list[float]], result: StepResult, config: FaultConfig) -> Spike | None:
    """The first measure that is above its limit; None while there are too few steps to compare with."""
    if len(usual) < config.spike_window:
        return None
    values = {"loss": result.loss, "grad_norm": result.grad_norm}
    watched = MEASURES if config.spike_measure == "either" else (config.spike_measure,)
    for measure in watched:
        limit = spike_limit([row[MEASURES.index(measure)] for row in usual], config)
        # A value that is not finite is above every limit.
        if not values[measure] <= limit:
            return Spike(measure, values[measure], limit)
    return None


def spike_limit(values: list[float], config: FaultConfig) -> float:
    """Median + spike_mads robust standard deviations, and at least spike_ratio medians: a flat curve has hardly any."""
    assert config.spike_mads is not None
    median = statistics.median(values)
    deviation = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in values)
    return max(median + config.spike_mads * deviation, config.spike_ratio * median)


def plan_rollback(state: TrainState, config: FaultConfig) -> Rollback | None:
    """What to do when spike_steps steps in a row were spikes; None before that."""
    if config.spike_mads is None or state.spikes_in_a_row < config.spike_steps:
        return None
    # Steps are counted from 1, their data from 0: step s was trained on what comes after s - 1 steps.
    first = max(state.step - state.spikes_in_a_row - config.spike_back, 0)
    return Rollback(first, (data_step(first, state.skipped_data), data_step(state.step - 1, state.skipped_data) + 1))


def recent_rollbacks(state: TrainState, config: FaultConfig) -> int:
    """Rollbacks among the last spike_max_rollbacks_in steps."""
    return sum(step > state.step - config.spike_max_rollbacks_in for step in state.rollbacks)
