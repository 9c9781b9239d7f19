"""megatron-core's optimizer in host memory: what checkpoints must know of it. Runs on CUDA devices only."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor


def stepped_tensor(optimizer: Any, main: Tensor) -> Tensor:
    """The tensor that is updated in place of `main`: its copy in host memory, or itself."""
    return optimizer.param_to_inner_param[main] if isinstance(optimizer, HybridDeviceOptimizer) else main


def share_state(optimizer: Any) -> None:
    """Let the optimizers that do the steps have the state that was given to the one that stands for them."""
    if not isinstance(optimizer, HybridDeviceOptimizer):
        return
    for single in optimizer.sub_optimizers:
        for group in single.param_groups:
            for inner in group["params"]:
                # The same dictionary, so that what is loaded into one is in the other.
                single.state[inner] = optimizer.state[optimizer.inner_param_to_orig_param[inner]]


@torch.no_grad()
def take_loaded_weights(optimizer: Any) -> None:
    """Bring the copies in host memory up to weights that were loaded on the device."""
    if not isinstance(optimizer, HybridDeviceOptimizer):
        return
    for main, inner in optimizer.param_to_inner_param.items():
        if inner is not main:
            inner.copy_(main)
