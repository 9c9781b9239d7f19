"""Flow matching on the straight path from noise (t=0) to data (t=1) (Step-Video-T2V, arXiv 2502.10248, 4.3.1).

Time stays in fp64 or fp32 everywhere; the model itself multiplies t by 1000.
"""

from __future__ import annotations

from torch import Tensor

from megatron_video.time_density import TimeDensity as TimeDensity
from megatron_video.time_density import shift_time as shift_time


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
