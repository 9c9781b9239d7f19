"""Normalisation layers that know about sequence parallelism and keep the reference's order of rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

BLOCK_NORM_EPS = 1e-5  # LayerNorm of the blocks; not the model's norm_eps (reference H5)


class BlockLayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, then adaLN modulation, computed on this rank's tokens [s, b, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.hidden_size, eps=BLOCK_NORM_EPS, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise tokens [s, b, D], then shift and scale them by [1, b, D] each."""
        return torch.addcmul(shift, super().forward(x), scale + 1)


class QKRMSNorm(nn.Module):
    """RMSNorm over the channels of one head: fp32 inside, rounded to the input's dtype, then weighted (H20)."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [s, b, heads, head_dim]."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


def mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Say that `module` sees only this rank's tokens, so that its gradients are summed over the TP group."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
