"""Flow matching on the straight path from noise (t=0) to data (t=1) (Step-Video-T2V, arXiv 2502.10248, 4.3.1).

Time stays in fp64 or fp32 everywhere; the model itself multiplies t by 1000.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import numpy as np
from torch import Tensor

from megatron_video.config_io import config_dataclass

_LARGEST_TIME = float(np.nextafter(np.float32(1), np.float32(0)))
_SMALLEST_PROBABILITY = 2.0**-54


def shift_time(time: float, shift: float) -> float:
    """Move time towards noise: with s = 1 - t, s' = shift * s / (1 + (shift - 1) * s), returns 1 - s'."""
    remaining = 1.0 - time
    return 1.0 - shift * remaining / (1.0 + (shift - 1.0) * remaining)


@config_dataclass
class TimeDensity:
    """The density that training draws t from. The paper states none; these are the ones in common use."""

    kind: Literal["uniform", "logit_normal"] = "uniform"
    """`uniform`, or `logit_normal`: logit(t) is normal, which prefers the middle of the path (arXiv 2403.03206)."""
    mean: float = 0.0
    """Mean of logit(t), for `logit_normal`; negative prefers the noise end."""
    std: float = 1.0
    """Standard deviation of logit(t), for `logit_normal`."""
    shift: float = 1.0
    """Applied after the draw as in `shift_time`; above 1 prefers the noise end, as large videos need."""

    def __post_init__(self) -> None:
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std={self.std} and shift={self.shift} must both be above 0")

    def quantile(self, probability: float) -> float:
        """The time below which `probability` of all draws lie: an fp32 value in [0, 1), monotone, computed in fp64."""
        if not 0 <= probability < 1:
            raise ValueError(f"probability={probability} is outside [0, 1)")
        time = probability
        if self.kind == "logit_normal":
            normal = NormalDist(self.mean, self.std).inv_cdf(max(probability, _SMALLEST_PROBABILITY))
            time = 1.0 / (1.0 + float(np.exp(-normal)))
        # Rounding to fp32 may reach 1.0, where no noise is left and the target is undefined by the input.
        return min(float(np.float32(shift_time(time, self.shift))), _LARGEST_TIME)


def interpolate(noise: Tensor, data: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) * noise + t * data, in fp32.

    Args:
        noise: [b, ...] standard normal.
        data: [b, ...] latents.
        time: [b] fp32 in [0, 1].

    Returns:
        [b, ...] fp32.
    """
    # fp32 also for bf16 latents: near the ends of the path bf16 would round the small share away.
    t = time.float().view(-1, *[1] * (data.dim() - 1))
    return (1 - t) * noise.float() + t * data.float()


def velocity(noise: Tensor, data: Tensor) -> Tensor:
    """The regression target dx_t/dt = data - noise, fp32, the same for every t."""
    return data.float() - noise.float()


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of squared errors of each sample, [b] fp32 on the prediction's device, from [b, ...].

    The mean is taken once, after sums and counts have been added over micro-batches and ranks, so that samples of
    different sizes weigh by their elements.

    Raises:
        ValueError: the shapes differ (broadcasting would hide it).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    # The difference, too, is taken in fp32: prediction and target nearly cancel late in training.
    return (prediction.float() - target.float()).square().flatten(1).sum(1)
