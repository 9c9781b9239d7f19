"""Self- and cross-attention of the DiT on megatron-core's attention modules.

Projections, head partitioning and checkpoint layout are megatron-core's. The forward passes are our own: they take
the rotary table and the number of real tokens by name, and leave out megatron-core's inference branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_video.dit import recompute
from megatron_video.dit.context_parallel import CONTEXT_PARALLEL, Attend, attend_to_all_tokens
from megatron_video.dit.packing import Packing, within_samples
from megatron_video.dit.rope import Rope


class SDPACoreAttention(nn.Module):
    """softmax(QK^T / sqrt(d)) V through torch's scaled_dot_product_attention, on any device."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, heads, head_dim]; `key` and `value` [sk, b, heads, head_dim].
            attention_mask: megatron-core's sense, True = hidden, broadcastable to [b, heads, sq, sk], or None.

        Returns:
            [sq, b, heads * head_dim].
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible = None if attention_mask is None else ~attention_mask
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class DiTSelfAttention(SelfAttention):
    """Full attention over all tokens of a video, QK-norm per head, rotary embedding of (frame, row, column)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        cp_comm_type: str,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            AttnMaskType.no_mask,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        hidden_states: Tensor,
        rope: Rope,
        num_tokens: int,
        recompute_core: bool = False,
        samples: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend over the `num_tokens` real tokens of the whole sequence; padding at its end is never a key.

        Args:
            hidden_states: [s, b, D], this rank's tokens under sequence and context parallelism.
            rope: tables for this context-parallel rank's tokens, padding included.
            num_tokens: real tokens over all ranks.
            recompute_core: keep only the projection's output, and norm, rotate and attend again in the backward pass.
            samples: tokens of each sample that shares the sequence; they do not see each other.

        Returns:
            [s, b, D]; the values at padding mean nothing.
        """
        attend = partial(self._attend, rope=rope, num_tokens=num_tokens, samples=samples)
        # Not split yet: megatron-core would norm queries and keys apart from their rotation.
        packed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        context = recompute.run(attend, packed, recompute=recompute_core, fp8=bool(self.config.fp8))
        out, _ = self.linear_proj(context)
        return out

    def _attend(self, packed: Tensor, rope: Rope, num_tokens: int, samples: Sequence[int] | None) -> Tensor:
        """[s, b, heads, 3 d] (query, key, value) of this context-parallel rank -> [s, b, heads * d]."""
        query, key, value = packed.chunk(3, dim=-1)
        query, key = self.q_layernorm(query, rope), self.k_layernorm(key, rope)
        core: Attend = partial(self.core_attention, attention_mask=None, attn_mask_type=AttnMaskType.no_mask)
        if samples is not None:
            core = within_samples(core, samples)
        group = self.pg_collection.cp
        if group.size() == 1:
            return attend_to_all_tokens(core, query, key, value, num_tokens)
        return CONTEXT_PARALLEL[self.cp_comm_type](core, query, key, value, num_tokens, group)


class DiTCrossAttention(CrossAttention):
    """Attention from video tokens to text tokens, QK-norm per head, no rotary embedding (reference 1.3, step 5)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        qk_norm: type[nn.Module],
        layer_number: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, AttnMaskType.padding, **kwargs)
        # These names make megatron-core sum the gradients over tensor-parallel ranks, each of which sees its own heads.
        sizes = {"hidden_size": self.hidden_size_per_attention_head, "config": config, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(qk_norm, **sizes)
        self.k_layernorm = build_module(qk_norm, **sizes)

    def forward(
        self, hidden_states: Tensor, text: Tensor, hidden_text: Tensor | None, packing: Packing | None = None
    ) -> Tensor:
        """Attend to the visible text.

        Args:
            hidden_states: [s, b, D], this rank's tokens under sequence parallelism.
            text: [L, b, D], the same on every tensor- and context-parallel rank.
            hidden_text: bool [b, 1, 1, L], True where a text token must not be seen; None where all are visible.
            packing: samples that share the sequence, whose texts lie behind one another too; each sees its own.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states, text)
        mask_type = AttnMaskType.no_mask if hidden_text is None else AttnMaskType.padding
        attend: Attend = partial(self.core_attention, attention_mask=hidden_text, attn_mask_type=mask_type)
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        context = attend(query, key, value) if packing is None else _to_own_text(attend, query, key, value, packing)
        out, _ = self.linear_proj(context)
        return out


def _to_own_text(attend: Attend, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    ends = list(itertools.accumulate(packing.text))
    own = {number: slice(end - packing.text[number], end) for number, end in enumerate(ends)}
    done = [
        attend(query[piece.first : piece.end], key[own[piece.sample]], value[own[piece.sample]])
        for piece in packing.gathered
    ]
    return torch.cat(done)
