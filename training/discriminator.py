"""Adversarial loss: a 3D PatchGAN with hinge loss, balanced against the other losses at the decoded frames.

The paper says only that a GAN loss is added once the others converge; the discriminator is a 3D form of pix2pix's
(Isola et al. 2017), and the balance is EnCodec's (Defossez et al. 2022): both losses' gradients are compared where the
decoder ends, not at its last weights, so that it is the same whatever ZeRO splits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.vae_config import AdversarialConfig
from training.vae_ranks import Ranks

BETAS = (0.5, 0.9)
SLOPE = 0.2
WIDEST = 8
NORM_GROUPS = 8
SEED_OFFSET = 1 << 20


class PatchDiscriminator(nn.Module):
    """One score for each patch of a video [B, 3, T, H, W]; a single frame is a video too."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**number, WIDEST) for number in range(num_layers + 1)]
        layers: list[nn.Module] = [_halving(3, widths[0]), nn.LeakyReLU(SLOPE)]
        for narrow, wide in itertools.pairwise(widths[:-1]):
            layers += [_halving(narrow, wide), _norm(wide), nn.LeakyReLU(SLOPE)]
        layers += [nn.Conv3d(widths[-2], widths[-1], 3, padding=1), _norm(widths[-1]), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, video: Tensor) -> Tensor:
        scores: Tensor = self.layers(video)
        return scores


class Adversary:
    """The discriminator with its optimizer; every rank holds all of it and averages its gradients."""

    def __init__(self, config: AdversarialConfig, seed: int, ranks: Ranks, autocast: torch.autocast) -> None:
        self.config, self.ranks, self.autocast = config, ranks, autocast
        self.updates = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + SEED_OFFSET)
            self.model = PatchDiscriminator(config.channels, config.num_layers).to(ranks.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, betas=BETAS)

    def gradient(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's hinge loss, -mean score, of frames [B, T, 3, H, W], and its gradient there."""
        leaf = frames.detach().requires_grad_()
        loss = -self._score(leaf).mean()
        # Gradients of the frames alone: the discriminator's own are not touched by the generator's loss.
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    def scale(self, others: Tensor, own: Tensor) -> float:
        """Factor that makes the gradient `own` as long as `others` over all ranks, times the weight; 0 in warm-up."""
        if self.updates < self.config.warmup_steps:
            return 0.0
        squares = self.ranks.mean(torch.stack([others.square().sum(), own.square().sum()]).double())
        ratio = (squares[0] / squares[1].clamp_min(1e-24)).sqrt().item()
        return self.config.weight * min(ratio, self.config.max_scale)

    def update(self, real: Tensor, fake: Tensor) -> float:
        """One step on the hinge loss of original and decoded frames; returns the loss over all ranks."""
        real_scores, fake_scores = self._score(real), self._score(fake.detach())
        loss = 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad = self.ranks.mean(parameter.grad)
        self.optimizer.step()
        self.updates += 1
        return self.ranks.mean(loss.detach()).item()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and position."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    def _score(self, frames: Tensor) -> Tensor:
        with self.autocast:
            return self.model(frames.transpose(1, 2)).float()


def has_converged(psnrs: list[float], config: AdversarialConfig) -> bool:
    """Whether the last `patience` evaluations together rose less than `min_gain` dB above the best before them."""
    if len(psnrs) <= config.patience:
        return False
    return max(psnrs[-config.patience :]) - max(psnrs[: -config.patience]) < config.min_gain


def _halving(in_channels: int, out_channels: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, (3, 4, 4), stride=(1, 2, 2), padding=1)


def _norm(channels: int) -> nn.GroupNorm:
    # No batch statistics: a sample is judged alike whatever it is batched with, on whatever rank.
    return nn.GroupNorm(NORM_GROUPS, channels)
