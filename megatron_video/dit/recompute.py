"""Activation recomputation: parts of the model that keep only their inputs and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from torch import Tensor


def run(function: Callable[..., Tensor], *inputs: Tensor | None, recompute: bool, fp8: bool = False) -> Tensor:
    """`function(*inputs)`; with `recompute` nothing but the inputs is kept for backward.

    Gradients flow to tensors among `inputs` only, not to those that `function` holds otherwise. A model with FP8
    layers needs `fp8`: it restores their scales and recipe too.
    """
    if not recompute:
        return function(*inputs)
    if fp8:
        result: Tensor = te_checkpoint(function, False, get_cuda_rng_tracker, None, *inputs)
    else:
        result = checkpoint(function, False, *inputs)
    return result
