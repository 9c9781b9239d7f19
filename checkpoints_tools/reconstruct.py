"""The moving average that a run would have had, from its checkpoints: which of them, in which shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.ema_profiles import (
    Mix,
    Profile,
    exponential_profile,
    mix_averages,
    mix_weights,
    power_profile,
)
from checkpoints_tools.weights import Weights
from megatron_video.errors import UserError
from training.checkpoint import read_config, read_state


@dataclass(frozen=True)
class WantedAverage:
    """A moving average that ends at the newest source; either `decay` or `width` is given."""

    decay: float | None = None
    """Exponential, as ema.decay of a run: share of the average that survives an update."""
    width: float | None = None
    """Power function of the updates (Karras et al. 2024): standard deviation over the run's length."""
    tolerance: float = 0.25
    """Most of the wanted profile that the sources may leave open."""

    def __post_init__(self) -> None:
        """Refuse a tolerance that is no share.

        Raises:
            UserError: naming it.
        """
        if not 0 <= self.tolerance <= 1:
            raise UserError(f"--tolerance {self.tolerance} is a share of the average, from 0 to 1")

    def profile(self, updates: int) -> Profile:
        """After that many updates."""
        if self.decay is not None:
            return exponential_profile(self.decay, updates)
        assert self.width is not None
        return power_profile(self.width, updates)


def reconstruct(sources: Sequence[Weights], wanted: WantedAverage, averaged: bool) -> tuple[list[Weights], Mix]:
    """Order checkpoints of one run by their recorded updates, and find their shares.

    Args:
        sources: at least two.
        wanted: what to come near to.
        averaged: the sources are moving averages that the run kept, and not its trained weights.

    Raises:
        UserError: unknown or equal numbers of updates; other runs; the sources leave more open than is tolerated.
    """
    updates = [_updates(source) for source in sources]
    order = sorted(range(len(sources)), key=updates.__getitem__)
    ordered, counts = [sources[i] for i in order], [updates[i] for i in order]
    _check_one_run(ordered, counts)
    profile = wanted.profile(counts[-1])
    mix = mix_averages(counts, _decays(ordered), profile) if averaged else mix_weights(counts, profile)
    _check_reached(mix, wanted.tolerance, ordered[0].origin)
    return ordered, mix


def recorded_step(source: Weights) -> int | None:
    """After which step of its run it was written; None if it does not say."""
    # Tools that write weights alone give them step 0, whatever it was.
    if not isinstance(source, CoreCheckpoint) or "training" not in read_config(source.folder):
        return None
    return read_state(source.folder).step


def _updates(source: Weights) -> int:
    """How often the weights had been updated; refused steps left them, and their average, alone."""
    if recorded_step(source) is None:
        raise UserError(
            f"{source.origin} does not say after which step of a run it was written (converted or averaged weights do "
            "not); a moving average needs the run's own checkpoints"
        )
    state = read_state(source.origin)
    return state.step - state.refused_steps


def _check_one_run(sources: Sequence[Weights], counts: Sequence[int]) -> None:
    for (first, before), (second, after) in itertools.pairwise(zip(sources, counts, strict=True)):
        if before == after:
            raise UserError(
                f"{first.origin} and {second.origin} are both after update {after}; leave one of them out (of other "
                "runs only a mean can be taken)"
            )
    plans = [read_state(source.origin).data_plan for source in sources]
    for source, plan in zip(sources, plans, strict=True):
        if plan != plans[0]:
            raise UserError(f"{source.origin} and {sources[0].origin} are of runs on other data: no one average")


def _decays(sources: Sequence[Weights]) -> list[float]:
    """With which each source's averages were made: one for all, since the run began, or what they hold is unknown."""
    decays: list[float | None] = [(read_config(source.origin).get("ema") or {}).get("decay") for source in sources]
    for source, decay in zip(sources, decays, strict=True):
        if decay is None or decay != decays[0]:
            raise UserError(
                f"{source.origin} has ema.decay={decay}, {sources[0].origin} {decays[0]}: what its average consists of "
                "is unknown; use checkpoints of one decay, or leave out --ema"
            )
    return [decay for decay in decays if decay is not None]


def _check_reached(mix: Mix, tolerance: float, first: Path) -> None:
    if mix.before_first is not None and mix.before_first > tolerance:
        raise UserError(
            f"{mix.before_first:.0%} of the wanted average lie before the first checkpoint ({first}): add earlier "
            f"ones, ask for a shorter average, or allow it with --tolerance {_upwards(mix.before_first)}"
        )
    if mix.residual is not None and mix.residual > tolerance:
        raise UserError(
            f"the nearest mix of the stored averages misses {mix.residual:.0%} of the wanted one; add checkpoints in "
            f"between, ask for a longer average, or allow it with --tolerance {_upwards(mix.residual)}"
        )


def _upwards(share: float) -> float:
    return math.ceil(100 * share) / 100
