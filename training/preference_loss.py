"""The loss of a pair of videos of which one was preferred, from the velocity errors of the policy and the reference.

For flow matching the log-likelihood ratio of Eq. 8 of arXiv 2502.10248 becomes a difference of squared velocity errors
at one t with one noise, e = mean over the latent's elements (the form of Diffusion-DPO, arXiv 2311.12908, with a weight
that is the same for every t):

    margin = -beta / 2 * [(e_w - e_w_ref) - (e_l - e_l_ref)]        loss = -log sigmoid(margin)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_video.flow_matching import squared_errors

# What is reported of a pair beside its loss, in the order of `preference_measures`.
MEASURES = (
    "reward_margin",
    "reward_accuracy",
    "winner_error",
    "loser_error",
    "winner_change",
    "loser_change",
)


@dataclass(frozen=True)
class Objective:
    """What is computed from the errors; see PreferenceConfig."""

    loss: str
    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def losses(self, errors: Tensor, reference: Tensor) -> Tensor:
        """Loss of every pair.

        Args:
            errors: [2, b] of the policy, winners first, with gradient.
            reference: [2, b] of the reference.

        Returns:
            [b] fp32.
        """
        margin = self.margins(errors, reference)
        losses = self._squared_distance(margin) if self.loss == "ipo" else self._noisy_labels(margin)
        return losses + self.sft_weight * errors[0] if self.sft_weight else losses

    def _squared_distance(self, margin: Tensor) -> Tensor:
        # margin / beta is the difference of log-likelihood ratios; its target is 1 / (2 beta).
        return (margin / self.beta - 0.5 / self.beta).square()

    def _noisy_labels(self, margin: Tensor) -> Tensor:
        right, wrong, share = -logsigmoid(margin), -logsigmoid(-margin), self.label_smoothing
        if self.loss == "rdpo":
            # The unbiased estimate of arXiv 2403.00409.
            return ((1 - share) * right - share * wrong) / (1 - 2 * share)
        return (1 - share) * right + share * wrong if share else right

    def margins(self, errors: Tensor, reference: Tensor) -> Tensor:
        """Implicit reward of the winner less that of the loser, [b]; arguments as those of `losses`."""
        change = errors - reference
        return -0.5 * self.beta * (change[0] - change[1])


def mean_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared velocity error of every sample, [b] fp32, from [b, T, C, h, w]."""
    return squared_errors(prediction, target) / target[0].numel()


def preference_measures(objective: Objective, errors: Tensor, reference: Tensor) -> Tensor:
    """What is reported of every pair, [len(MEASURES), b] fp32, without gradient; arguments as those of `losses`.

    An accuracy of one half is that of a margin of zero, as all are before the first step. A change below zero is an
    error smaller than the reference's: that both rise shows as two changes above zero.
    """
    errors = errors.detach()
    margin, change = objective.margins(errors, reference), errors - reference
    accuracy = torch.where(margin == 0, 0.5, (margin > 0).float())
    return torch.stack([margin, accuracy, errors[0], errors[1], change[0], change[1]])
