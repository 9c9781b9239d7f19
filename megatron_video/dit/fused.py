"""The memory-bound operations of a DiT block that pay as one kernel, each with its plain torch form.

CUDA tensors go to the Triton kernels of `dit.kernels`, all others to the plain form, which is also what the kernels are
tested against. This is the one place that chooses. The forms round at the same places in forward; the kernels' backward
is fp32 throughout and keeps less (`tests/benchmarks/fused_bench.py` measures both, and torch.compile beside them).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_video.dit.rope import Rope

logger = logging.getLogger(__name__)
_switched_off = False


def modulated_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`shift + (1 + scale) * LayerNorm(x)` (adaLN, arXiv 2502.10248 section 4.2).

    Args:
        x: [s, b, D]; `weight` and `bias` [D].
        shift: [1, b, D]; `scale` [1, b, D]. Backward keeps them un-repeated (section 6.2.3).
        eps: added to the variance.
    """
    if has_kernels(x):
        from megatron_video.dit.kernels.layer_norm import ModulatedLayerNorm

        return ModulatedLayerNorm.apply(x, weight, bias, shift, scale, eps)
    return plain_modulated_layer_norm(x, weight, bias, shift, scale, eps)


def rotated_rms_norm(x: Tensor, weight: Tensor, eps: float, rope: Rope) -> Tensor:
    """RoPE-3D of the RMSNorm over each head's channels; x [s, b, heads, head_dim], weight [head_dim]."""
    if has_kernels(x):
        from megatron_video.dit.kernels.rms_norm import RotatedRMSNorm

        return RotatedRMSNorm.apply(x, weight, eps, rope.cos, rope.sin, rope.split)
    return plain_rotated_rms_norm(x, weight, eps, rope)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over each head's channels; x [s, b, heads, head_dim], weight [head_dim]."""
    if has_kernels(x):
        from megatron_video.dit.kernels.rms_norm import RotatedRMSNorm

        return RotatedRMSNorm.apply(x, weight, eps, None, None, None)
    return plain_rms_norm(x, weight, eps)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`x + gate * branch`; x and branch [s, b, D], gate [1, b, D], kept un-repeated for backward."""
    if has_kernels(x):
        from megatron_video.dit.kernels.residual import GatedResidual

        return GatedResidual.apply(x, gate, branch)
    return plain_gated_residual(x, gate, branch)


def plain_modulated_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """`modulated_layer_norm` in torch."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], weight, bias, eps), scale + 1)


def plain_rotated_rms_norm(x: Tensor, weight: Tensor, eps: float, rope: Rope) -> Tensor:
    """`rotated_rms_norm` in torch."""
    return rope.rotate(plain_rms_norm(x, weight, eps))


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch: fp32 inside, rounded to x's dtype, then weighted (reference H20)."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def plain_gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`gated_residual` in torch."""
    return torch.addcmul(x, gate, branch)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Plain torch on every device inside: to measure what the kernels bring, and to look for a fault in them."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def has_kernels(x: Tensor) -> bool:
    """Whether the operations on `x` run as Triton kernels."""
    return x.is_cuda and not _switched_off and _triton_is_installed()


@lru_cache
def _triton_is_installed() -> bool:
    installed = importlib.util.find_spec("triton") is not None
    if not installed:
        logger.warning("triton is not installed: norms, modulation and residuals run as plain torch, which is slower")
    return installed
