"""One DiT block: modulated self-attention, cross-attention to the text, modulated feed-forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_video.dit import fused, offload, recompute
from megatron_video.dit.attention import DiTCrossAttention, DiTSelfAttention
from megatron_video.dit.context_parallel import TokenLayout
from megatron_video.dit.dropout import keyed_dropout
from megatron_video.dit.modulation import block_modulations
from megatron_video.dit.norms import BlockLayerNorm
from megatron_video.dit.packing import by_sample
from megatron_video.dit.specs import LayerSpec


class DiTLayer(MegatronModule):
    """`x += gate * SelfAttn(mod(LN1 x)); x += CrossAttn(x, text); x += gate * FF(mod(LN2 x))`."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: LayerSpec,
        layer_number: int,
        groups: ProcessGroupCollection,
        recomputed_modules: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(config)
        self.layer_number, self.recomputed_modules = layer_number, recomputed_modules
        self.norm1 = BlockLayerNorm(config)
        self.self_attention = DiTSelfAttention(
            config, spec.self_attention, layer_number, config.cp_comm_type, pg_collection=groups
        )
        # Text is not cut over context-parallel ranks: every rank's tokens see all of it without communication.
        whole_text = copy.copy(config)
        whole_text.context_parallel_size = 1
        self.cross_attention = DiTCrossAttention(
            whole_text, spec.cross_attention, spec.qk_norm, layer_number, pg_collection=groups
        )
        self.norm2 = BlockLayerNorm(config)
        self.mlp = MLP(config, spec.mlp, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)
        self.modulation_table = nn.Parameter(torch.empty(6, config.hidden_size, dtype=config.params_dtype))
        self.modulation_table.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        x: Tensor,
        shared_modulation: Tensor,
        text: Tensor,
        hidden_text: Tensor | None,
        dropout_seeds: Tensor | None,
        tokens: TokenLayout,
    ) -> Tensor:
        """Run the block.

        Args:
            x: [s, b, D], this rank's tokens under sequence and context parallelism.
            shared_modulation: [b, 6, D].
            text: [L, b, D]; `hidden_text` bool [b, 1, 1, L] or None (see `DiTCrossAttention.forward`).
            dropout_seeds: int64 [b], or None for no dropout.
            tokens: which tokens `x` holds, and their rotary tables.
        """
        attention, feed_forward = block_modulations(self.modulation_table, shared_modulation)
        inputs = (x, attention.shift, attention.scale)
        attended = offload.run("self_attention", self.config, self._attend_to_video, *inputs, tokens)
        x = self._gated(x, attention.gate, self._drop(attended, 0, dropout_seeds, tokens), tokens)
        attended = offload.run("cross_attention", self.config, self._attend_to_text, x, text, hidden_text, tokens)
        x = x + self._drop(attended, 1, dropout_seeds, tokens)
        inputs = (x, feed_forward.shift, feed_forward.scale)
        fed = offload.run("mlp", self.config, self._feed_forward, *inputs, tokens)
        return self._gated(x, feed_forward.gate, self._drop(fed, 2, dropout_seeds, tokens), tokens)

    def _attend_to_video(self, x: Tensor, shift: Tensor, scale: Tensor, tokens: TokenLayout) -> Tensor:
        recomputed = "core_attn" in self.recomputed_modules
        samples = None if tokens.packing is None else tokens.packing.video
        normed = _modulated(self.norm1, [x], [shift, scale], tokens)
        attended: Tensor = self.self_attention(normed, tokens.rope, tokens.count, recomputed, samples)
        return attended

    def _attend_to_text(self, x: Tensor, text: Tensor, hidden_text: Tensor | None, tokens: TokenLayout) -> Tensor:
        def attend(x: Tensor, text: Tensor, hidden_text: Tensor | None) -> Tensor:
            attended: Tensor = self.cross_attention(x, text, hidden_text, tokens.packing)
            return attended

        return self._recomputable("cross_attention", attend, x, text, hidden_text)

    def _feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, tokens: TokenLayout) -> Tensor:
        def feed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            fed: Tensor = self.mlp(_modulated(self.norm2, [x], [shift, scale], tokens))[0]
            return fed

        return self._recomputable("mlp", feed, x, shift, scale)

    @staticmethod
    def _gated(x: Tensor, gate: Tensor, branch: Tensor, tokens: TokenLayout) -> Tensor:
        def add(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
            return fused.gated_residual(x, gate, branch)

        return _modulated(add, [x, branch], [gate], tokens)

    def _recomputable(self, name: str, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        recomputed = name in self.recomputed_modules
        return recompute.run(function, *inputs, recompute=recomputed, fp8=bool(self.config.fp8))

    def _drop(self, branch: Tensor, index: int, seeds: Tensor | None, tokens: TokenLayout) -> Tensor:
        """Dropout on the output of one of the block's three branches."""
        if seeds is None:
            return branch
        place = 3 * self.layer_number + index
        return keyed_dropout(branch, self.config.hidden_dropout, seeds, place, tokens.first)


def _modulated(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], modulations: Sequence[Tensor], tokens: TokenLayout
) -> Tensor:
    """`function(*inputs, *modulations)`: of tokens [s, b, D] and modulations [1, b, D], each sample with its own."""
    if tokens.packing is None:
        return function(*inputs, *modulations)
    return by_sample(function, inputs, modulations, tokens.packing.held)
