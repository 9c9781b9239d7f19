"""Normalisation layers that know about sequence parallelism and keep the reference's order of rounding."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_video.dit import fused
from megatron_video.dit.rope import Rope

BLOCK_NORM_EPS = 1e-5  # LayerNorm of the blocks; not the model's norm_eps (reference H5)


class BlockLayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, then adaLN modulation, computed on this rank's tokens [s, b, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.hidden_size, eps=BLOCK_NORM_EPS, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise tokens [s, b, D], then shift and scale them by [1, b, D] each."""
        return fused.modulated_layer_norm(x, self.weight, self.bias, shift, scale, self.eps)


class QKRMSNorm(nn.Module):
    """RMSNorm over the channels of one head, for queries and keys; self-attention rotates them at once."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """Normalise `x` [s, b, heads, head_dim], and rotate it if a table is given."""
        if rope is None:
            return fused.rms_norm(x, self.weight, self.eps)
        return fused.rotated_rms_norm(x, self.weight, self.eps, rope)


def mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Say that `module` sees only this rank's tokens, so that its gradients are summed over the TP group."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
