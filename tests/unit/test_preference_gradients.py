"""Gradients of the preference loss through a real DiT: against plain PyTorch, the closed form, and their signs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LATENT_CHANNELS, LLM_DIM
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import one_process
from training.data import Batch
from training.preference_data import PairBatch, pair_errors, pair_loss
from training.preference_loss import Objective
from training.train_step import predict

PAIRS, BETA, SHAPE = 3, 30.0, (2, LATENT_CHANNELS, 3, 4)
OBJECTIVE = Objective("dpo", BETA)


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    """Policy and reference: two models of other weights."""
    config = DiTConfig(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        caption_channels=[LLM_DIM, CLIP_DIM],
    )
    with one_process() as parallel:
        found = [
            build_dit(config, parallel, torch.float32, device=torch.device("cpu"), init_seed=seed)[0] for seed in (0, 1)
        ]
        generator = torch.Generator().manual_seed(2)
        for model in found:
            for parameter in model.parameters():
                # A new model has gates and a head of zeros, through which most gradients would be zero.
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
        yield found[0], found[1]


def random_pairs() -> PairBatch:
    """b pairs as 2b rows; winner and loser share noise, time and text."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    noise, videos, time = random(PAIRS, *SHAPE), random(2, PAIRS, *SHAPE), torch.tensor([0.2, 0.5, 0.9])
    weight = time.view(-1, 1, 1, 1, 1)
    llm, clip = random(PAIRS, 6, LLM_DIM), random(PAIRS, CLIP_SLOTS, CLIP_DIM)
    return PairBatch(
        latents=torch.cat([(1 - weight) * noise + weight * video for video in videos]),
        timestep=time.repeat(2),
        llm_states=llm.repeat(2, 1, 1),
        clip_states=clip.repeat(2, 1, 1),
        text_lengths=torch.full((2 * PAIRS,), CLIP_SLOTS + 6),
        target=torch.cat([video - noise for video in videos]),
    )


def gradient(model: Any, loss: Tensor) -> Tensor:
    """Of all weights, as one vector."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([
        torch.zeros(weight.numel()) if part is None else part.flatten()
        for weight, part in zip(parameters, found, strict=True)
    ])  # fmt: skip


def ours(model: Any, reference: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient, by the functions of the training."""
    with torch.no_grad():
        errors = pair_errors(batch, predict(batch, reference))[2]["errors"]
    ready = replace(batch, objective=OBJECTIVE, reference_errors=errors)
    total, count, _ = pair_loss(ready, predict(ready, model))
    return total.detach() / count, gradient(model, total / count)


def velocities(model: Any, batch: Batch, rows: slice) -> Tensor:
    texts = (batch.llm_states[rows], batch.clip_states[rows], batch.text_lengths[rows])  # type: ignore[index]
    return torch.as_tensor(model(batch.latents[rows], batch.timestep[rows], *texts, dropout_seeds=None))


def plain_errors(model: Any, batch: Batch, rows: slice) -> Tensor:
    return torch.mean((velocities(model, batch, rows) - batch.target[rows]) ** 2, dim=(1, 2, 3, 4))


def both(error: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
    return error(slice(0, PAIRS)), error(slice(PAIRS, 2 * PAIRS))


def test_loss_and_gradient_of_plain_pytorch(models: tuple[Any, Any]) -> None:
    policy, reference = models
    batch = random_pairs()
    winner, loser = both(lambda rows: plain_errors(policy, batch, rows))
    with torch.no_grad():
        winner_ref, loser_ref = both(lambda rows: plain_errors(reference, batch, rows))
    margin = -BETA / 2 * ((winner - winner_ref) - (loser - loser_ref))
    loss = -logsigmoid(margin).mean()
    # Neither saturated nor at its start.
    assert 0.05 < float(margin.detach().abs().max()) < 20
    our_loss, our_gradient = ours(policy, reference, batch)
    torch.testing.assert_close(our_loss, loss.detach(), rtol=1e-5, atol=0)
    expected = gradient(policy, loss)
    assert float((our_gradient - expected).norm() / expected.norm()) < 1e-5


def test_gradient_is_the_closed_form(models: tuple[Any, Any]) -> None:
    policy, reference = models
    batch = random_pairs()
    with torch.no_grad():
        policy_errors = both(lambda rows: plain_errors(policy, batch, rows))
        reference_errors = both(lambda rows: plain_errors(reference, batch, rows))
    change = [now - before for now, before in zip(policy_errors, reference_errors, strict=True)]
    # Eq. 9 of the paper: every pair weighs by how wrong its implicit reward is, sigmoid(-margin).
    weights = BETA / 2 * torch.sigmoid(BETA / 2 * (change[0] - change[1])) / PAIRS
    expected = torch.zeros(())
    for pair in range(PAIRS):
        errors = [plain_errors(policy, batch, slice(row, row + 1))[0] for row in (pair, PAIRS + pair)]
        apart = [gradient(policy, error) for error in errors]
        expected = expected + weights[pair] * (apart[0] - apart[1])
    found = ours(policy, reference, batch)[1]
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_swapped_members_turn_the_gradient_round(models: tuple[Any, Any]) -> None:
    policy, _ = models
    batch = random_pairs()
    rows = [*range(PAIRS, 2 * PAIRS), *range(PAIRS)]
    tensors: dict[str, Any] = {item.name: getattr(batch, item.name) for item in fields(Batch)}
    swapped = replace(batch, **{name: value[rows] for name, value in tensors.items() if torch.is_tensor(value)})
    # Where policy and reference are one, the weight is sigmoid(0) both ways.
    there, back = (ours(policy, policy, pairs)[1] for pairs in (batch, swapped))
    assert float(there.norm()) > 0.1
    assert float((there + back).norm() / there.norm()) < 1e-5


def test_equal_members_have_no_gradient(models: tuple[Any, Any]) -> None:
    policy, reference = models
    batch = random_pairs()
    winners = {name: getattr(batch, name)[:PAIRS].repeat(2, 1, 1, 1, 1) for name in ("latents", "target")}
    loss, found = ours(policy, reference, replace(batch, **winners))
    assert float(loss) == pytest.approx(0.6931472, rel=1e-6)
    assert float(found.norm()) < 1e-5 * float(ours(policy, reference, batch)[1].norm())
