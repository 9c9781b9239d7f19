"""The density that training draws t from, as its inverse distribution function: a pure function, computed in fp64.

t=0 is noise and t=1 is data. Publications that count from data to noise (sigma = 1 - t) are turned round here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Literal

import numpy as np

from megatron_video.config_io import config_dataclass

_LARGEST_TIME = float(np.nextafter(np.float32(1), np.float32(0)))
_SMALLEST_PROBABILITY = 2.0**-54
# Beyond it the inverse distribution function of `mode` would fall somewhere, so it would not be one.
_LARGEST_MODE_SCALE = 2 / (math.pi - 2)
# exp() of it still fits in fp64; the density is then two spikes.
_LARGEST_SHARPNESS = 300.0


def shift_time(time: float, shift: float) -> float:
    """Move time towards noise: with s = 1 - t, s' = shift * s / (1 + (shift - 1) * s), returns 1 - s'."""
    remaining = 1.0 - time
    return 1.0 - shift * remaining / (1.0 + (shift - 1.0) * remaining)


@config_dataclass
class TimeDensity:
    """The density that training draws t from. The paper states none; these are the ones in common use."""

    kind: Literal["uniform", "logit_normal", "mode", "u_shaped"] = "uniform"
    """`uniform`; `logit_normal`: logit(t) is normal, which prefers the middle of the path; `mode`: prefers the middle
    or the ends and leaves out neither (both arXiv 2403.03206, 3.1); `u_shaped`: exp(a t) + exp(a (1 - t)), which
    prefers the ends, for few-step distillation (meant by arXiv 2502.10248, section 5)."""
    mean: float = 0.0
    """Mean of logit(t), for `logit_normal`; negative prefers the noise end."""
    std: float = 1.0
    """Standard deviation of logit(t), for `logit_normal`."""
    mode_scale: float = 1.29
    """For `mode`, from -1 to 2 / (pi - 2): above 0 prefers the middle, below 0 the ends, 0 is uniform."""
    u_sharpness: float = 5.0
    """The a of `u_shaped`."""
    shift: float = 1.0
    """Applied after the draw as in `shift_time`; above 1 prefers the noise end, as large videos need."""
    shift_base_tokens: int | None = None
    """Video tokens of a sample for which `shift` holds; samples of n times as many get shift * sqrt(n), so that noise
    hides as much of large samples as of small ones (arXiv 2403.03206, 5.3.2). Null: one shift for all."""

    def __post_init__(self) -> None:
        """Refuse what is no density.

        Raises:
            ValueError: naming the field, the value and what is allowed.
        """
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std={self.std} and shift={self.shift} must both be above 0")
        if not -1 <= self.mode_scale <= _LARGEST_MODE_SCALE:
            raise ValueError(f"mode_scale={self.mode_scale} must lie between -1 and {_LARGEST_MODE_SCALE:.4f}")
        if not 0 < self.u_sharpness <= _LARGEST_SHARPNESS:
            raise ValueError(f"u_sharpness={self.u_sharpness} must be above 0 and at most {_LARGEST_SHARPNESS:.0f}")
        if self.shift_base_tokens is not None and self.shift_base_tokens < 1:
            raise ValueError(f"shift_base_tokens={self.shift_base_tokens} must be at least 1, or null")

    def for_tokens(self, tokens: int) -> TimeDensity:
        """The density for samples of `tokens` video tokens, with its shift worked out."""
        if self.shift_base_tokens is None:
            return self
        shift = self.shift * math.sqrt(tokens / self.shift_base_tokens)
        return replace(self, shift=shift, shift_base_tokens=None)

    def quantile(self, probability: float) -> float:
        """The time below which `probability` of all draws lie: an fp32 value in [0, 1), monotone, computed in fp64.

        Raises:
            ValueError: a probability outside [0, 1), or a shift that depends on the tokens (see `for_tokens`).
        """
        if not 0 <= probability < 1:
            raise ValueError(f"probability={probability} is outside [0, 1)")
        if self.shift_base_tokens is not None:
            raise ValueError(f"shift_base_tokens={self.shift_base_tokens}: the density is that of for_tokens(tokens)")
        time = self._unshifted_quantile(probability)
        # Rounding may reach 1.0, where no noise is left and the target is undefined by the input, or fall below 0.
        return min(max(float(np.float32(shift_time(time, self.shift))), 0.0), _LARGEST_TIME)

    def _unshifted_quantile(self, probability: float) -> float:
        if self.kind == "logit_normal":
            normal = NormalDist(self.mean, self.std).inv_cdf(max(probability, _SMALLEST_PROBABILITY))
            return 1.0 / (1.0 + float(np.exp(-normal)))
        if self.kind == "mode":
            return mode_quantile(probability, self.mode_scale)
        if self.kind == "u_shaped":
            return u_shaped_quantile(probability, self.u_sharpness)
        return probability


def mode_quantile(probability: float, scale: float) -> float:
    """f_mode of arXiv 2403.03206, 3.1, in t = 1 - sigma: u + scale * (u - sin^2(pi u / 2))."""
    return probability + scale * (probability - math.sin(0.5 * math.pi * probability) ** 2)


def u_shaped_quantile(probability: float, sharpness: float) -> float:
    """Inverse of the distribution function of exp(a t) + exp(a (1 - t)) on [0, 1]."""
    # With y = exp(a t) the distribution function reads y - exp(a) / y = (2 p - 1) (exp(a) - 1): a quadratic in y.
    end = math.exp(sharpness)
    middle = (2.0 * probability - 1.0) * (end - 1.0)
    root = math.hypot(middle, 2.0 * math.sqrt(end))
    # The form without a difference of two nearly equal numbers.
    y = 0.5 * (root + middle) if middle > 0 else 2.0 * end / (root - middle)
    return math.log(y) / sharpness
