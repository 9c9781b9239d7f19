"""One DiT block: modulated self-attention, cross-attention to the text, modulated feed-forward."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_video.dit.attention import DiTCrossAttention, DiTSelfAttention
from megatron_video.dit.modulation import block_modulations
from megatron_video.dit.norms import BlockLayerNorm
from megatron_video.dit.rope import Rope
from megatron_video.dit.specs import LayerSpec


class DiTLayer(MegatronModule):
    """`x += gate * SelfAttn(mod(LN1 x)); x += CrossAttn(x, text); x += gate * FF(mod(LN2 x))`."""

    def __init__(
        self, config: TransformerConfig, spec: LayerSpec, layer_number: int, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.norm1 = BlockLayerNorm(config)
        self.self_attention = DiTSelfAttention(
            config, spec.self_attention, layer_number, AttnMaskType.no_mask, pg_collection=groups
        )
        self.cross_attention = DiTCrossAttention(
            config, spec.cross_attention, spec.qk_norm, layer_number, pg_collection=groups
        )
        self.norm2 = BlockLayerNorm(config)
        self.mlp = MLP(config, spec.mlp, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)
        self.modulation_table = nn.Parameter(torch.empty(6, config.hidden_size, dtype=config.params_dtype))
        self.modulation_table.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, shared_modulation: Tensor, text: Tensor, hidden_text: Tensor | None, rope: Rope, tokens: int
    ) -> Tensor:
        """Run the block.

        Args:
            x: [s, b, D], this rank's tokens under sequence parallelism.
            shared_modulation: [b, 6, D].
            text: [L, b, D]; `hidden_text` bool [b, 1, 1, L] or None (see `DiTCrossAttention.forward`).
            rope: rotary tables of the grid; `tokens` the number of real tokens over all ranks.
        """
        attention, feed_forward = block_modulations(self.modulation_table, shared_modulation)
        attended = self.self_attention(attention.apply(self.norm1(x)), rope, tokens)
        x = torch.addcmul(x, attention.gate, attended)
        x = x + self.cross_attention(x, text, hidden_text)
        fed, _ = self.mlp(feed_forward.apply(self.norm2(x)))
        return torch.addcmul(x, feed_forward.gate, fed)
