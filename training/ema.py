"""Exponential moving average of the weights, in fp32, cut over replicas like the optimizer's own fp32 weights."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor

from training.main_parameters import main_parameters

if TYPE_CHECKING:
    from training.config import EMAConfig


class EMA:
    """Averages of every parameter this rank's optimizer updates: average = decay * average + (1 - decay) * weight."""

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self.decay = decay
        # The optimizer keeps these tensors for its whole life, so they are looked up once and not in every step.
        self._mains = [item.main for item in main_parameters(optimizer)]
        self._averages: list[Tensor | None] = []
        self.restart()

    @property
    def averages(self) -> list[Tensor | None]:
        """One for every parameter of main_parameters, in that order; None where this rank has no part."""
        return self._averages

    def restart(self) -> None:
        """Start again from the weights of this moment."""
        self._averages = [None if main is None else main.detach().float().clone() for main in self._mains]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; call it after every update of them."""
        mains = [main for main in self._mains if main is not None]
        torch._foreach_lerp_([average for average in self._averages if average is not None], mains, 1 - self.decay)


class HostEMA(EMA):
    """Averages in host memory: a step copies the weights there, and a thread moves the averages while training goes on.

    Needs twice the memory of the averages, none of it on the device.
    """

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self._copies: list[Tensor] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._following: Future[None] | None = None
        super().__init__(optimizer, decay)

    @property
    def averages(self) -> list[Tensor | None]:
        """As in EMA, on the host, of distributed tensors this rank's part; waits for the last update."""
        self._settle()
        return self._averages

    def restart(self) -> None:
        """Start again from the weights of this moment."""
        self._settle()
        self._averages = [None if main is None else _host_copy(main) for main in self._mains]
        # Pinned: the device writes to them while it computes.
        mains = [main for main in self._mains if main is not None]
        self._copies = [_host_copy(main, pinned=main.is_cuda) for main in mains]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights; call it after every update of them."""
        self._settle()
        mains = [to_local_if_dtensor(main.detach()) for main in self._mains if main is not None]
        for copy, main in zip(self._copies, mains, strict=True):
            copy.copy_(main, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if any(main.is_cuda for main in mains) else None
        self._following = self._thread.submit(self._follow, copied)

    def _settle(self) -> None:
        """Until the averages have followed the last update."""
        if self._following is not None:
            self._following.result()
            self._following = None

    @torch.no_grad()
    def _follow(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        averages = [average for average in self._averages if average is not None]
        torch._foreach_lerp_(averages, self._copies, 1 - self.decay)


def build_ema(settings: EMAConfig, optimizer: MegatronOptimizer) -> EMA | None:
    """The averages that the settings ask for, or None."""
    if settings.decay is None:
        return None
    kind = HostEMA if settings.device == "cpu" else EMA
    return kind(optimizer, settings.decay)


def _host_copy(tensor: Tensor, pinned: bool = False) -> Tensor:
    local = to_local_if_dtensor(tensor.detach())
    return torch.empty(local.shape, dtype=torch.float32, pin_memory=pinned).copy_(local)
