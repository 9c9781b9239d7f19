"""Configuration of preference alignment (Video-DPO)."""

from __future__ import annotations

from typing import Literal

from megatron_video.config_io import config_dataclass


@config_dataclass
class PreferenceConfig:
    """Training on pairs of videos of one prompt, of which one was preferred (arXiv 2502.10248, section 4.4)."""

    loss: Literal["dpo", "rdpo", "ipo"] = "dpo"
    """dpo: -log sigmoid of the implicit reward margin (arXiv 2305.18290; the paper's Eq. 8); rdpo: the same with known
    label noise taken out (arXiv 2403.00409), see label_smoothing; ipo: its squared distance from a finite margin (arXiv
    2310.12036), which cannot be driven to infinity by labels that are always right."""
    beta: float = 500.0
    """Weight of the margin, in 1 / mean squared velocity error. The paper's argument: a small beta with a larger
    learning rate converges far faster than the 5,000 of Diffusion-DPO, whose gradients must be clipped; it gives no
    value. The same at every t."""
    final_beta: float | None = None
    """Beta of the last step, reached along a straight line; null: constant."""
    label_smoothing: float = 0.0
    """Probability p that a label is wrong, in [0, 0.5). dpo: the loss of the swapped pair counts that much, which holds
    margins at log((1 - p) / p); rdpo: it is taken off, and the rest divided by 1 - 2p, so that the mean over wrong and
    right labels is the loss of right ones, at the price of a larger variance."""
    sft_weight: float = 0.0
    """Weight of the winner's own velocity error, added to the loss: keeps winners from getting worse in step with
    losers."""
    reference: Literal["precomputed", "swapped"] = "precomputed"
    """Where the reference's errors come from. precomputed: from a pass of their own before the first step, kept in the
    run's folder; swapped: computed in every step, the reference's weights taking the place of the trained ones, which
    wait in host memory. Neither keeps a second model on the device, and both give the same numbers."""
    reference_weights: str | None = None
    """Run or checkpoint folder of the reference; null: run.initial_weights, the policy's own start."""
    reference_from_ema: bool | None = None
    """Take the averaged weights of that checkpoint; null: as run.initial_from_ema says."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: naming the field, the value and what is allowed.
        """
        for name in ("beta", "final_beta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError(f"label_smoothing={self.label_smoothing} does not go with loss=ipo; set it to 0")
        if not self.label_smoothing and self.loss == "rdpo":
            raise ValueError("loss=rdpo needs label_smoothing, the share of wrong labels; without any, take loss=dpo")
        if not 0 <= self.sft_weight < float("inf"):
            raise ValueError(f"sft_weight={self.sft_weight} must not be negative")

    def beta_at(self, step: int, steps: int) -> float:
        """Beta of a step, counted from 0, of a run of so many."""
        if self.final_beta is None or steps < 2:
            return self.beta
        return self.beta + (self.final_beta - self.beta) * min(1.0, step / (steps - 1))
