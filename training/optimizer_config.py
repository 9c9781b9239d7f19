"""AdamW and its learning rate over the steps, as configured."""

from __future__ import annotations

from typing import Literal

from megatron_video.config_io import config_dataclass


@config_dataclass
class AdamWConfig:
    """AdamW, its learning rate over the steps, and gradient clipping."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step of the decay."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    decay: Literal["constant", "cosine", "wsd"] = "constant"
    """What the learning rate does after the warm-up: stay; fall along half a cosine to the last step; or stay and fall
    in the last steps only (`wsd`: warm-up, stable, decay; arXiv 2404.06395), so that a run can be made longer."""
    decay_steps: int | None = None
    """Steps of the fall at the end of `wsd`."""
    decay_fraction: float | None = None
    """The same as a share of training.steps, e.g. 0.2; give one of the two."""
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] | None = None
    """How `wsd` falls; null is `linear`. `one_minus_sqrt` falls fastest at first (arXiv 2405.18392)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square gradient."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norms, biases and modulation tables have none."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 switches clipping off."""
    cpu_offload: bool = False
    """Keep and update the moments in host memory: 8 bytes a parameter less on the device (divided over the replicas),
    for the time that gradients and weights take to the host and back."""

    def __post_init__(self) -> None:
        """Refuse values AdamW cannot use.

        Raises:
            ValueError: naming the fields and the values.
        """
        if not 0 <= self.min_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be above 0 and min_learning_rate={self.min_learning_rate} "
                "between 0 and it"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        for name in ("warmup_steps", "weight_decay", "clip_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        self._check_decay()

    def _check_decay(self) -> None:
        names = ("decay_steps", "decay_fraction", "decay_shape")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.decay != "wsd":
            if given:
                listed = ", ".join(f"{name}={value}" for name, value in given.items())
                raise ValueError(f"{listed}: of use with decay=wsd only, and decay={self.decay}")
            return
        if (self.decay_steps is None) == (self.decay_fraction is None):
            raise ValueError(
                f"decay=wsd needs the length of its fall: one of decay_steps={self.decay_steps} and "
                f"decay_fraction={self.decay_fraction}, such as decay_fraction=0.2"
            )
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps={self.decay_steps} must be at least 1")
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie above 0 and at most be 1")

    def fall_steps(self, total_steps: int) -> int:
        """Steps at the end of `total_steps` over which the learning rate falls."""
        if self.decay == "constant":
            return 0
        # Of a cosine all steps behind the warm-up fall.
        if self.decay == "cosine":
            return max(total_steps - self.warmup_steps, 0)
        if self.decay_steps is not None:
            return self.decay_steps
        assert self.decay_fraction is not None
        return max(round(self.decay_fraction * total_steps), 1)
