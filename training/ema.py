"""Exponential moving average of the weights, in fp32, cut over replicas like the optimizer's own fp32 weights."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from training.main_parameters import MainParameter, main_parameters


class EMA:
    """Averages of every parameter this rank's optimizer updates: average = decay * average + (1 - decay) * weight."""

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self.decay = decay
        self._optimizer = optimizer
        self.averages: list[Tensor | None] = []
        self.restart()

    def restart(self) -> None:
        """Start again from the weights of this moment."""
        self.averages = [None if item.main is None else item.main.detach().float().clone() for item in self._items()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; call it after every update of them."""
        pairs = [(average, item.main) for average, item in zip(self.averages, self._items(), strict=True)]
        held = [(average, main) for average, main in pairs if average is not None and main is not None]
        torch._foreach_lerp_([average for average, _ in held], [main for _, main in held], 1 - self.decay)

    def _items(self) -> list[MainParameter]:
        return main_parameters(self._optimizer)
