"""Activation recomputation: parts of the model that keep only their inputs and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel import checkpoint
from torch import Tensor


def run(function: Callable[..., Tensor], *inputs: Tensor | None, recompute: bool) -> Tensor:
    """`function(*inputs)`; with `recompute` nothing but the inputs is kept for backward.

    Gradients flow to tensors among `inputs` only, not to those that `function` holds otherwise.
    """
    if not recompute:
        return function(*inputs)
    result: Tensor = checkpoint(function, False, *inputs)
    return result
