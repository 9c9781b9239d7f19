"""Loss on held-out samples during training."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from megatron_video.config_io import config_dataclass


@config_dataclass
class ValidationConfig:
    """What is validated on, and how often. Noise and times are fixed, so that only the weights move the figures."""

    every: int = 0
    """Steps between validations, and one after the last step; 0 for none."""
    shards: list[str] = field(default_factory=list)
    """Folders of held-out shards (`megatron-video data split` makes them). A run is refused if a source video of
    theirs is among the training data too."""
    samples_per_bucket: int | None = 64
    """First samples of every bucket that are used; null for all."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one replica."""
    time_quantiles: int = 9
    """Times at which every sample is evaluated: the midpoints of so many equal parts of the probability."""
    times: Literal["density", "uniform"] = "density"
    """`density`: parts of the training density of t (flow), so that their mean estimates the training loss. `uniform`:
    equal parts of [0, 1), the same for every density."""
    seed: int = 0
    """Of the noise; not the run's, so that runs of different seeds are measured alike."""
    ema: bool = True
    """Validate the averaged weights too, where there are any (ema.decay)."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing, and validation without data.

        Raises:
            ValueError: naming the fields, the values and the way out.
        """
        for name in ("micro_batch_size", "time_quantiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.samples_per_bucket is not None and self.samples_per_bucket < 1:
            raise ValueError(f"samples_per_bucket={self.samples_per_bucket} must be at least 1, or null for all")
        if self.every < 0:
            raise ValueError(f"every={self.every} must not be negative")
        if self.every and not self.shards:
            raise ValueError(
                f"every={self.every} needs shards: folders of held-out samples, such as `megatron-video data split` "
                "makes; every=0 switches validation off"
            )

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether a validation follows `step`, counted from 1."""
        return self.every > 0 and (step % self.every == 0 or step == last_step)
