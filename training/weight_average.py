"""Exponential moving average of a module's weights; every rank that holds the weights has the same one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages in fp32: average = decay * average + (1 - decay) * weight, from the weights it is made with."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self._module = decay, module
        self.averages = {name: weight.detach().float().clone() for name, weight in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; call it after every step."""
        weights = self._module.state_dict()
        for name, average in self.averages.items():
            average.lerp_(weights[name].float(), 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module has the averages for its weights."""
        own = {name: weight.detach().clone() for name, weight in self._module.state_dict().items()}
        self._module.load_state_dict(self.averages)
        try:
            yield
        finally:
            self._module.load_state_dict(own)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Continue with saved averages."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
