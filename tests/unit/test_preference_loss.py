"""The preference loss and its gradient against closed forms and against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from training.preference_config import PreferenceConfig
from training.preference_loss import MEASURES, Objective, mean_errors, preference_measures

REFERENCE = torch.tensor([[0.50, 0.40, 0.9], [0.60, 0.30, 0.7]])
ERRORS = torch.tensor([[0.45, 0.42, 0.8], [0.61, 0.33, 0.5]])


def loss_and_gradient(objective: Objective, errors: torch.Tensor = ERRORS) -> tuple[torch.Tensor, torch.Tensor]:
    errors = errors.clone().requires_grad_()
    losses = objective.losses(errors, REFERENCE)
    (gradient,) = torch.autograd.grad(losses.sum(), errors)
    return losses.detach(), gradient


def test_the_loss_is_the_formula_and_its_gradient_the_closed_form() -> None:
    beta = 30.0
    losses, gradient = loss_and_gradient(Objective("dpo", beta))
    for pair in range(3):
        (winner, loser), (winner_ref, loser_ref) = ERRORS[:, pair].tolist(), REFERENCE[:, pair].tolist()
        margin = -beta / 2 * ((winner - winner_ref) - (loser - loser_ref))
        assert float(losses[pair]) == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), rel=1e-5)
        # Eq. 9 of the paper: -(1 - sigmoid(margin)) times the margin's own gradient, -+beta / 2.
        slope = beta / 2 * (1 - 1 / (1 + math.exp(-margin)))
        assert gradient[:, pair].tolist() == pytest.approx([slope, -slope], rel=1e-5)


def test_label_smoothing_is_the_cross_entropy_of_a_soft_label() -> None:
    objective = Objective("dpo", 12.0, label_smoothing=0.3)
    expected = binary_cross_entropy_with_logits(
        objective.margins(ERRORS, REFERENCE), torch.full((3,), 0.7), reduction="none"
    )
    torch.testing.assert_close(loss_and_gradient(objective)[0], expected)


def test_rdpo_is_the_loss_of_right_labels_in_the_mean_over_noisy_ones() -> None:
    share = 0.3
    robust, plain = Objective("rdpo", 12.0, label_smoothing=share), Objective("dpo", 12.0)
    right, wrong = robust.losses(ERRORS, REFERENCE), robust.losses(ERRORS.flip(0), REFERENCE.flip(0))
    torch.testing.assert_close((1 - share) * right + share * wrong, plain.losses(ERRORS, REFERENCE))
    # Conservative DPO is not: it is least at a finite margin, log((1 - p) / p).
    held = REFERENCE + torch.tensor([[-1.0], [1.0]]) * math.log((1 - share) / share) / 12.0
    gradient = loss_and_gradient(Objective("dpo", 12.0, label_smoothing=share), held)[1]
    torch.testing.assert_close(gradient, torch.zeros(2, 3), atol=1e-5, rtol=0)


def test_ipo_is_least_at_its_finite_margin() -> None:
    beta = 8.0
    objective = Objective("ipo", beta)
    # A difference of log-likelihood ratios of 1 / (2 beta), that is of errors of 1 / beta.
    there = REFERENCE + torch.tensor([[-0.5 / beta], [0.5 / beta]])
    losses, gradient = loss_and_gradient(objective, there)
    torch.testing.assert_close(losses, torch.zeros(3), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(2, 3), atol=1e-6, rtol=0)
    assert (loss_and_gradient(objective)[0] > 0).all()


def test_the_regulariser_adds_the_winners_error() -> None:
    plain, regularised = (loss_and_gradient(Objective("dpo", 5.0, sft_weight=weight)) for weight in (0.0, 0.25))
    torch.testing.assert_close(regularised[0] - plain[0], 0.25 * ERRORS[0])
    torch.testing.assert_close(regularised[1] - plain[1], torch.tensor([[0.25], [0.0]]).expand(2, 3))


def test_swapping_the_members_flips_the_margin() -> None:
    objective = Objective("dpo", 7.0)
    there, back = objective.margins(ERRORS, REFERENCE), objective.margins(ERRORS.flip(0), REFERENCE.flip(0))
    assert (there != 0).all()
    torch.testing.assert_close(there, -back)


def test_a_pair_with_equal_members_moves_nothing() -> None:
    prediction = torch.randn(2, 1, 4, 3, 5, requires_grad=True)
    both = torch.cat([prediction[:1], prediction[:1]])
    errors = mean_errors(both, torch.zeros_like(both)).view(2, 1)
    loss = Objective("dpo", 500.0).losses(errors, torch.tensor([[0.7], [0.7]]))
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_measures_tell_that_both_got_worse() -> None:
    objective = Objective("dpo", 10.0)
    measures = dict(zip(MEASURES, preference_measures(objective, ERRORS, REFERENCE), strict=True))
    # The second pair: winner 0.02 worse, loser 0.03 worse, and still a margin that looks like success.
    assert float(measures["winner_change"][1]) == pytest.approx(0.02)
    assert float(measures["loser_change"][1]) == pytest.approx(0.03)
    assert float(measures["reward_margin"][1]) == pytest.approx(0.05, rel=1e-5)
    assert measures["reward_accuracy"].tolist() == [1.0, 1.0, 0.0]
    start = preference_measures(objective, REFERENCE, REFERENCE)
    assert start[MEASURES.index("reward_accuracy")].tolist() == [0.5] * 3


def test_beta_follows_its_line() -> None:
    preference = PreferenceConfig(beta=100.0, final_beta=500.0)
    assert [preference.beta_at(step, 5) for step in range(6)] == [100, 200, 300, 400, 500, 500]
    assert PreferenceConfig(beta=100.0).beta_at(3, 5) == 100


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"final_beta": -1.0}, "final_beta=-1.0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "does not go with loss=ipo"),
        ({"loss": "rdpo"}, "loss=rdpo needs label_smoothing"),
        ({"sft_weight": -0.1}, "sft_weight=-0.1"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreferenceConfig(**values)
