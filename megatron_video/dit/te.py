"""The `transformer_engine` layer spec: linears and attention of Transformer Engine, on CUDA. Import it only there.

Parameters have the names, shapes and tensor-parallel marks of the `local` spec, so that checkpoints go both ways.

LayerNorm is not fused with the linear behind it (TELayerNormColumnParallelLinear): the adaLN modulation lies between
them. QK-norm stays our own too: Transformer Engine's RMSNorm multiplies by the weight before it rounds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_video.dit.context_parallel import RINGS

__all__ = ["SelfCoreAttention", "TEColumnParallelLinear", "TERowParallelLinear", "TextCoreAttention"]


class SelfCoreAttention(TEDotProductAttention):
    """Attention of video tokens to video tokens.

    The rings (`p2p`, `a2a+p2p`) are Transformer Engine's own. `a2a` and `all_gather` are ours, around a core that
    knows of no context parallelism: so padding can be left out, which Transformer Engine could not do under them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        cp_comm_type: str,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        size, ring = config.context_parallel_size, cp_comm_type in RINGS
        if size > 1 and not ring:
            config = copy.copy(config)
            config.context_parallel_size = 1
        super().__init__(config, cp_comm_type=cp_comm_type, pg_collection=pg_collection, **kwargs)
        # After the all-to-all a rank has all tokens of this many heads; checked in the forward pass.
        if cp_comm_type == "a2a":
            self.num_gqa_groups_per_partition //= size


class TextCoreAttention(TEDotProductAttention):
    """Attention of video tokens to text tokens, some of which may be hidden, at the end of the text."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attend; see `SDPACoreAttention.forward`. The mask is bool [b, 1, 1, text], True = hidden."""
        if attention_mask is None:
            return super().forward(query, key, value, None, **kwargs)
        # Transformer Engine wants one mask for the queries and one for the keys.
        tokens, batch = query.shape[:2]
        no_query_hidden = torch.zeros(batch, 1, 1, tokens, dtype=torch.bool, device=query.device)
        return super().forward(query, key, value, (no_query_hidden, attention_mask), **kwargs)
