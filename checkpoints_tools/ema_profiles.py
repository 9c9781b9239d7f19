"""Which checkpoints, in which shares, give the moving average that a run would have had.

An average of a run's weights is described by its profile: the share of the weights after every update, [updates + 1],
first the initial ones. Two ways lead from checkpoints to a wanted profile:

From trained weights: weights between two checkpoints are taken to lie on the line between them, and weights before the
first to equal it. Error: h^2 / 8 times the second derivative over updates, h updates between checkpoints; and noise is
averaged over fewer samples than the run has updates.

From stored averages: the mix of their profiles that is nearest to the wanted one by least squares (post-hoc EMA, Karras
et al. 2024, arXiv 2312.02696, section 3.2). Error: what of the wanted profile no mix reaches, which is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_video.errors import UserError

Profile = NDArray[np.float64]
"""[updates + 1], sum 1."""

# Standard deviation of a flat profile over its length; power functions are narrower.
_WIDEST = 1 / math.sqrt(12)
# Directions in which the stored profiles hardly differ would only amplify the rounding of the stored averages.
_SMALLEST_SINGULAR_VALUE = 1e-6


@dataclass(frozen=True)
class Mix:
    """Shares of checkpoints that give an average."""

    shares: list[float]
    """Of every checkpoint; they add up to 1, and may be negative."""
    residual: float | None = None
    """Norm of the difference between wanted and reached profile over the norm of the wanted one; None if not known."""
    before_first: float | None = None
    """Share of the wanted average that lies before the first checkpoint."""
    widest_gap: int | None = None
    """Most updates between two trained weights, which are taken to lie on a line there."""
    gap_share: float | None = None
    """Share of the wanted average that lies in that gap."""

    @property
    def amplification(self) -> float:
        """By how much rounding errors of the checkpoints grow: the sum of the shares' absolute values."""
        return float(np.abs(self.shares).sum())


def exponential_profile(decay: float, updates: int) -> Profile:
    """Of training.ema.EMA: average = decay * average + (1 - decay) * weight, starting at the initial weights.

    Raises:
        UserError: a decay that averages nothing or never moves.
    """
    if not 0 < decay < 1:
        raise UserError(f"the decay {decay} must lie between 0 and 1, e.g. 0.999: the average of the last 1,000 steps")
    profile = decay ** np.arange(updates, -1, -1, dtype=np.float64)
    profile[1:] *= 1 - decay
    return profile


def power_profile(relative_width: float, updates: int) -> Profile:
    """Share ~ (update / updates)^gamma (Karras et al., section 3.1); an update counts with the integral over its unit.

    Args:
        relative_width: standard deviation of the profile over its length, sigma_rel there; 0.05 to 0.15 are usual.
        updates: its length.

    Raises:
        UserError: a width that no such profile has.
    """
    if not 0 < relative_width < _WIDEST:
        raise UserError(f"the relative width {relative_width} must lie between 0 and {_WIDEST:.4f} (equal shares)")
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma.
    inverse = relative_width**-2
    gamma = np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()
    reached = (np.arange(updates + 1, dtype=np.float64) / updates) ** (gamma + 1)
    return np.diff(reached, prepend=0.0)


def mix_weights(updates: Sequence[int], wanted: Profile) -> Mix:
    """Shares of trained weights, after `updates` (rising; the last one is where the wanted profile ends)."""
    places = np.asarray(updates)
    every = np.arange(len(wanted))
    right = np.clip(np.searchsorted(places, every), 1, len(places) - 1)
    width = places[right] - places[right - 1]
    # The weights before the first checkpoint count as the first's.
    towards_right = np.clip((every - places[right - 1]) / width, 0.0, 1.0)
    shares = np.bincount(right, wanted * towards_right, len(places))
    shares += np.bincount(right - 1, wanted * (1 - towards_right), len(places))
    gap = int(np.diff(places).argmax())
    return Mix(
        shares.tolist(),
        before_first=float(wanted[: places[0]].sum()),
        widest_gap=int(places[gap + 1] - places[gap]),
        gap_share=float(wanted[places[gap] + 1 : places[gap + 1]].sum()),
    )


def mix_averages(updates: Sequence[int], decays: Sequence[float], wanted: Profile) -> Mix:
    """Shares of stored exponential averages, after `updates` with `decays`, nearest to the wanted profile."""
    stored = np.zeros((len(wanted), len(updates)))
    for column, (count, decay) in enumerate(zip(updates, decays, strict=True)):
        stored[: count + 1, column] = exponential_profile(decay, count)
    # The last share is 1 less the others, so that weights that never move stay what they are.
    others = stored[:, :-1] - stored[:, -1:]
    found, *_ = np.linalg.lstsq(others, wanted - stored[:, -1], rcond=_SMALLEST_SINGULAR_VALUE)
    shares = np.append(found, 1 - found.sum())
    residual = np.linalg.norm(stored @ shares - wanted) / np.linalg.norm(wanted)
    return Mix(shares.tolist(), residual=float(residual))
