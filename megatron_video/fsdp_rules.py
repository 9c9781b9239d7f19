"""Rows of the table of refusals (layout_rules.py) that are about Megatron-FSDP."""

from __future__ import annotations

from megatron_video.layout import Layout, Rule

FSDP = "parallel.use_megatron_fsdp"
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
ZERO = "parallel.use_distributed_optimizer"
OVERLAP_REDUCE, OVERLAP_GATHER = "parallel.overlap_grad_reduce", "parallel.overlap_param_gather"
WORLD = "world_size"


def _ranks_to_cut_over(layout: Layout) -> int:
    return layout.data_parallel_size * layout.parallel.context_parallel_size


FSDP_RULES: tuple[Rule, ...] = (
    Rule(
        name="Megatron-FSDP over pipeline stages",
        fields=(FSDP, PP),
        refuses=lambda layout: layout[FSDP] and layout[PP] > 1,
        reason="every stage has the embedders, and would cut them over its ranks at other rows than the next, "
        "so that their gradients could not be summed",
        example={FSDP: True, PP: 2},
    ),
    Rule(
        name="Megatron-FSDP with nothing to cut over",
        fields=(FSDP, WORLD, TP, CP),
        refuses=lambda layout: layout[FSDP] and _ranks_to_cut_over(layout) < 2,
        # megatron-core 0.16.1 (_bucket_group_gradient_reduce) adds the reduced gradients to the buffer they came from.
        reason="it cuts over data- and context-parallel ranks; with one of them it would count gradients twice",
        example={FSDP: True, WORLD: 1},
    ),
    Rule(
        name="Megatron-FSDP beside the distributed optimizer",
        fields=(FSDP, ZERO, OVERLAP_REDUCE, OVERLAP_GATHER),
        refuses=lambda layout: layout[FSDP] and (layout[ZERO] or layout[OVERLAP_REDUCE] or layout[OVERLAP_GATHER]),
        reason="FSDP shards the optimizer itself, and overlaps as parallel.data_parallel_sharding_strategy allows",
        example={FSDP: True, ZERO: True},
    ),
)
