"""Exponential moving average of the weights, in fp32, cut over replicas like the optimizer's own fp32 weights."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from training.main_parameters import main_parameters


class EMA:
    """Averages of every parameter this rank's optimizer updates: average = decay * average + (1 - decay) * weight."""

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self.decay = decay
        # The optimizer keeps these tensors for its whole life, so they are looked up once and not in every step.
        self._mains = [item.main for item in main_parameters(optimizer)]
        self.averages: list[Tensor | None] = []
        self.restart()

    def restart(self) -> None:
        """Start again from the weights of this moment."""
        self.averages = [None if main is None else main.detach().float().clone() for main in self._mains]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; call it after every update of them."""
        pairs = zip(self.averages, self._mains, strict=True)
        held = [(average, main) for average, main in pairs if average is not None and main is not None]
        torch._foreach_lerp_([average for average, _ in held], [main for _, main in held], 1 - self.decay)
