"""Weight gradients that their matrix product adds into the fp32 gradient buffer itself, where its kernel exists."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

from megatron_video.dit import VideoDiT


def fuse_gradient_accumulation(model: VideoDiT) -> int:
    """Switch it on in a model whose weights have their buffers (`main_grad`) already.

    Transformer Engine's linears bring the kernel, megatron-core's take Apex's. Without it the gradient is made in the
    weight's type first and then added: more memory traffic, and in bf16 one more rounding.

    Returns:
        Number of linear layers that accumulate so.
    """
    if model.config.fine_grained_activation_offloading:
        # Offloading hands Transformer Engine copies of the weights, without the buffers.
        return 0
    return sum(_fuse(module) for module in model.modules())


def _fuse(module: Any) -> bool:
    if hasattr(module, "fuse_wgrad_accumulation"):
        module.fuse_wgrad_accumulation = hasattr(module.weight, "main_grad")
        return bool(module.fuse_wgrad_accumulation)
    if isinstance(module, ColumnParallelLinear | RowParallelLinear) and _grad_accum_fusion_available:
        module.gradient_accumulation_fusion = hasattr(module.weight, "main_grad")
        return bool(module.gradient_accumulation_fusion)
    return False
