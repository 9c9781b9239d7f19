"""Where samples cannot share a sequence; rows of megatron_video.layout_rules.RULES."""

from __future__ import annotations

from megatron_video.layout import Rule

PACK = "data.pack_tokens"
CP = "parallel.context_parallel_size"
CP_TYPE = "parallel.cp_comm_type"
DROPOUT = "model.hidden_dropout"

PACKING_RULES: tuple[Rule, ...] = (
    Rule(
        name="packed samples where replicas go in step",
        fields=(PACK,),
        refuses=lambda layout: bool(layout.why_equally_many),
        reason="replicas pack what they have into different numbers of sequences, and {layout.why_equally_many}",
        example={PACK: 100, "parallel.use_megatron_fsdp": True},
    ),
    Rule(
        name="packed samples cut over context-parallel ranks",
        fields=(PACK, CP, CP_TYPE),
        refuses=lambda layout: layout[CP] > 1 and layout[CP_TYPE] != "a2a",
        reason="only a2a brings all tokens of every sample to one rank, where they can be told apart",
        example={PACK: 100, CP: 2, CP_TYPE: "all_gather"},
    ),
    Rule(
        name="packed samples with dropout",
        fields=(PACK, DROPOUT),
        refuses=lambda layout: layout[DROPOUT] > 0,
        reason="dropout masks are drawn for samples that lie beside each other",
        example={PACK: 100, DROPOUT: 0.1},
    ),
)
