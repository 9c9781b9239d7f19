"""Layouts that cannot work, and why: one table, which every command asks before process groups start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_video.errors import UserError
from megatron_video.fp8_rules import FP8_RULES
from megatron_video.fsdp_rules import FSDP_RULES
from megatron_video.layout import Change, Layout, Rule, nearest
from megatron_video.offload_rules import OFFLOAD_RULES
from megatron_video.packing_rules import PACKING_RULES

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
CP_TYPE = "parallel.cp_comm_type"
CP_SIZES = "parallel.hierarchical_context_parallel_sizes"
SP = "parallel.sequence_parallel"
ZERO = "parallel.use_distributed_optimizer"
OVERLAP_REDUCE = "parallel.overlap_grad_reduce"
OVERLAP_GATHER = "parallel.overlap_param_gather"
RECOMPUTE = "parallel.recompute_granularity"
RECOMPUTE_LAYERS = "parallel.recompute_num_layers"
RECOMPUTE_MODULES = "parallel.recompute_modules"
IMPL = "parallel.transformer_impl"
HEADS = "model.num_attention_heads"
HEAD_DIM = "model.attention_head_dim"
LAYERS = "model.num_layers"
PATCH = "model.patch_size"
PRECISION = "training.precision"
BUCKETS = "data.buckets"
BATCH = "data.global_batch_size"
BALANCE = "data.balance"
IMAGES = "data.images_per_video"
WORLD = "world_size"
CUDA = "hardware.cuda"
CAPABILITY = "hardware.compute_capability"
ENGINE = "hardware.transformer_engine"

RULES: tuple[Rule, ...] = (
    # Sizes come first: the others divide by them.
    Rule(
        name="tensor size below 1",
        fields=(TP,),
        refuses=lambda layout: layout[TP] < 1,
        reason="a number of ranks is at least 1",
        example={TP: 0},
    ),
    Rule(
        name="pipeline size below 1",
        fields=(PP,),
        refuses=lambda layout: layout[PP] < 1,
        reason="a number of stages is at least 1",
        example={PP: 0},
    ),
    Rule(
        name="context size below 1",
        fields=(CP,),
        refuses=lambda layout: layout[CP] < 1,
        reason="a number of ranks is at least 1",
        example={CP: 0},
    ),
    Rule(
        name="fewer than two chunks",
        fields=(VPP,),
        refuses=lambda layout: layout[VPP] is not None and layout[VPP] < 2,
        reason="the interleaved schedule needs at least two chunks of layers a stage; null is the plain schedule",
        example={PP: 2, VPP: 1},
    ),
    Rule(
        name="ranks hold no whole replicas",
        fields=(WORLD, TP, PP, CP),
        refuses=lambda layout: layout[WORLD] % layout.parallel.model_parallel_size > 0,
        reason="every replica of the model takes TP x PP x CP = {layout.parallel.model_parallel_size} ranks",
        example={WORLD: 3, TP: 2},
    ),
    # Tensor and sequence parallelism.
    Rule(
        name="heads over tensor-parallel ranks",
        fields=(TP, HEADS),
        refuses=lambda layout: layout[HEADS] % layout[TP] > 0,
        reason="the size does not divide the attention heads, and every rank gets equally many whole ones",
        example={HEADS: 2, TP: 3},
    ),
    Rule(
        name="sequence parallelism alone",
        fields=(SP, TP),
        refuses=lambda layout: layout[SP] and layout[TP] < 2,
        reason="sequence parallelism cuts the tokens over the tensor-parallel ranks, and there is one only",
        example={SP: True},
    ),
    # Pipeline stages.
    Rule(
        name="layers over stages",
        fields=(PP, VPP, LAYERS),
        refuses=lambda layout: layout[LAYERS] % layout.stages > 0,
        reason="the layers cannot be cut into {layout.stages} equal pieces (stages x chunks of each)",
        example={LAYERS: 2, PP: 3},
    ),
    Rule(
        name="chunks of a single stage",
        fields=(VPP, PP),
        refuses=lambda layout: layout[VPP] is not None and layout[PP] < 2,
        reason="the interleaved schedule goes round the stages, and needs at least two",
        example={VPP: 2},
    ),
    # Replicas.
    Rule(
        name="more replicas than micro-batches",
        fields=(BATCH, WORLD),
        refuses=lambda layout: layout.micro_batches_per_replica < 1,
        reason="each of {layout.data_parallel_size} replicas needs a micro-batch of {layout.micro_batch_size} or more "
        "samples in every step, and there are {layout.micro_batches}",
        example={BATCH: 2, WORLD: 3},
    ),
    Rule(
        name="cost balance where replicas go in step",
        fields=(BALANCE,),
        refuses=lambda layout: layout[BALANCE] == "cost" and bool(layout.why_equally_many),
        reason="balance by cost gives replicas different numbers of micro-batches, and {layout.why_equally_many}",
        example={BALANCE: "cost", PP: 2, VPP: 2},
    ),
    Rule(
        name="images on top where replicas go in step",
        fields=(IMAGES, BALANCE),
        refuses=lambda layout: layout[IMAGES] is not None and not layout.balances_cost,
        reason="images beside the videos make steps whose micro-batches are not equally many for every replica"
        "{layout.and_why_equally_many}; draw them in turn with data.bucket_weights instead",
        example={IMAGES: 1.0, BALANCE: "none"},
    ),
    Rule(
        name="micro-batches over replicas",
        fields=(BATCH, WORLD, BALANCE),
        refuses=lambda layout: not layout.balances_cost and layout.micro_batches_left_over > 0,
        reason="the global batch is a multiple of micro-batch size x replicas "
        "({layout.micro_batch_size} x {layout.data_parallel_size}), so that each has equally many micro-batches"
        "{layout.and_why_equally_many}",
        example={BATCH: 3, WORLD: 2, BALANCE: "none"},
    ),
    Rule(
        name="micro-batches over interleaved stages",
        fields=(BATCH, VPP, PP, WORLD),
        refuses=lambda layout: layout[VPP] is not None and layout.micro_batches_per_replica % layout[PP] > 0,
        reason="the interleaved schedule takes micro-batches in rounds of as many as there are stages, and one replica "
        "has {layout.micro_batches_per_replica} a step",
        example={BATCH: 3, WORLD: 2, PP: 2, VPP: 2},
    ),
    Rule(
        name="gather without sharded optimizer",
        fields=(OVERLAP_GATHER, ZERO),
        refuses=lambda layout: layout[OVERLAP_GATHER] and not layout[ZERO],
        reason="only the distributed optimizer leaves parameters to be gathered",
        example={OVERLAP_GATHER: True, OVERLAP_REDUCE: True},
    ),
    Rule(
        name="overlapped gather without overlapped reduction",
        fields=(OVERLAP_GATHER, OVERLAP_REDUCE),
        refuses=lambda layout: layout[OVERLAP_GATHER] and not layout[OVERLAP_REDUCE],
        reason="megatron-core overlaps the gather only where it overlaps the reduction of gradients",
        example={OVERLAP_GATHER: True, ZERO: True},
    ),
    # Context parallelism.
    Rule(
        name="ring on the local spec",
        fields=(CP_TYPE, CP, IMPL),
        refuses=lambda layout: layout[CP] > 1 and "p2p" in layout[CP_TYPE] and layout[IMPL] == "local",
        reason="the ring of keys and values is Transformer Engine's; the local spec has a2a and all_gather",
        example={CP: 2, CP_TYPE: "p2p"},
    ),
    Rule(
        name="two-level exchange without its sizes",
        fields=(CP_SIZES, CP_TYPE, CP),
        refuses=lambda layout: layout[CP] > 1 and layout[CP_TYPE] == "a2a+p2p" and layout[CP_SIZES] is None,
        reason="a2a+p2p needs to know [ranks of one all-to-all group, ranks of one ring]",
        example={CP: 4, CP_TYPE: "a2a+p2p", IMPL: "transformer_engine"},
    ),
    Rule(
        name="sizes of another exchange",
        fields=(CP_SIZES, CP_TYPE),
        refuses=lambda layout: layout[CP_SIZES] is not None and layout[CP_TYPE] != "a2a+p2p",
        reason="only a2a+p2p has two levels",
        example={CP: 4, CP_SIZES: [2, 2]},
    ),
    Rule(
        name="two-level sizes that do not multiply",
        fields=(CP_SIZES, CP),
        refuses=lambda layout: layout[CP_SIZES] is not None and not _are_factors(layout[CP_SIZES], layout[CP]),
        reason="two numbers of at least 1 whose product is the context-parallel size",
        example={CP_TYPE: "a2a+p2p", CP_SIZES: [2, 2]},
    ),
    Rule(
        name="heads over context-parallel ranks",
        fields=(CP, CP_TYPE, CP_SIZES, TP, HEADS),
        refuses=lambda layout: layout.heads_per_rank % layout.all_to_all_size > 0,
        reason="the all-to-all gives each of its {layout.all_to_all_size} ranks equally many of the "
        "{layout.heads_per_rank} heads of a tensor-parallel rank",
        example={CP: 3, HEADS: 2},
    ),
    Rule(
        name="ring over padded tokens",
        fields=(BUCKETS, PATCH, CP_TYPE, CP, SP, TP),
        refuses=lambda layout: layout[CP] > 1 and "p2p" in layout[CP_TYPE] and bool(layout.padded_buckets),
        reason="the ring cannot leave padding out of attention, and needs samples of a multiple of {layout.token_unit} "
        "video tokens; {layout.padded_buckets}",
        example={BUCKETS: ["17x48x48"], PATCH: 1, CP: 2, CP_TYPE: "p2p", IMPL: "transformer_engine"},
    ),
    # Recomputation of activations.
    Rule(
        name="recomputed layers without full recompute",
        fields=(RECOMPUTE_LAYERS, RECOMPUTE),
        refuses=lambda layout: layout[RECOMPUTE_LAYERS] is not None and layout[RECOMPUTE] != "full",
        reason="only full recomputation counts layers; the selective one is the same in every layer",
        example={RECOMPUTE_LAYERS: 1},
    ),
    Rule(
        name="no recomputed layers",
        fields=(RECOMPUTE_LAYERS, RECOMPUTE),
        refuses=lambda layout: layout[RECOMPUTE_LAYERS] is not None and layout[RECOMPUTE_LAYERS] < 1,
        reason="at least one layer is recomputed; null means all, and recompute_granularity=null none",
        example={RECOMPUTE: "full", RECOMPUTE_LAYERS: 0},
    ),
    Rule(
        name="more recomputed layers than there are",
        fields=(RECOMPUTE_LAYERS, LAYERS, PP, VPP),
        refuses=lambda layout: (layout[RECOMPUTE_LAYERS] or 0) > layout[LAYERS] // layout.stages,
        reason="layers are counted in every piece of the model; pieces (stages x chunks of each): {layout.stages}",
        example={LAYERS: 2, RECOMPUTE: "full", RECOMPUTE_LAYERS: 3},
    ),
    Rule(
        name="selective recompute of nothing",
        fields=(RECOMPUTE_MODULES, RECOMPUTE),
        refuses=lambda layout: layout[RECOMPUTE] == "selective" and not layout[RECOMPUTE_MODULES],
        reason="nothing is named that is to be recomputed",
        example={RECOMPUTE: "selective", RECOMPUTE_MODULES: []},
    ),
    # Transformer Engine.
    Rule(
        name="Transformer Engine without CUDA",
        fields=(IMPL, CUDA),
        refuses=lambda layout: layout[IMPL] == "transformer_engine" and not layout[CUDA],
        reason="Transformer Engine runs on CUDA devices only, and torch sees none",
        example={IMPL: "transformer_engine", ENGINE: "2.11.0"},
    ),
    Rule(
        name="Transformer Engine not installed",
        fields=(IMPL, ENGINE),
        refuses=lambda layout: layout[IMPL] == "transformer_engine" and layout[ENGINE] is None,
        reason="the package transformer-engine is not installed (pip install megatron-video[gpu])",
        example={IMPL: "transformer_engine", CUDA: True},
    ),
    Rule(
        name="Transformer Engine on an old device",
        fields=(IMPL, CAPABILITY),
        refuses=lambda layout: layout[IMPL] == "transformer_engine" and _older(layout[CAPABILITY], (8, 0)),
        reason="Transformer Engine needs compute capability 8.0 (A100) or later",
        example={IMPL: "transformer_engine", CUDA: True, CAPABILITY: (7, 5), ENGINE: "2.11.0"},
    ),
    Rule(
        name="context parallelism of Transformer Engine in fp32",
        fields=(CP, IMPL, PRECISION),
        refuses=lambda layout: _engine_cp(layout) and layout[PRECISION] == "fp32",
        reason="its attention over several ranks has kernels for 16-bit numbers only",
        example={CP: 2, IMPL: "transformer_engine", PRECISION: "fp32"},
    ),
    Rule(
        name="context parallelism of Transformer Engine with odd heads",
        fields=(CP, IMPL, HEAD_DIM),
        refuses=lambda layout: _engine_cp(layout) and (layout[HEAD_DIM] % 8 > 0 or layout[HEAD_DIM] > 256),
        reason="its attention over several ranks needs heads of a multiple of 8 channels, at most 256",
        example={CP: 2, IMPL: "transformer_engine", HEAD_DIM: 12, "model.rope_channel_split": [4, 4, 4]},
    ),
    *FP8_RULES,
    *FSDP_RULES,
    *OFFLOAD_RULES,
    *PACKING_RULES,
)


def check_layout(layout: Layout) -> None:
    """Refuse a layout that cannot work; what is not known of it is not judged.

    Raises:
        UserError: naming the fields, their values, the reason, and the nearest layouts that work.
    """
    rule = broken_rule(layout)
    if rule is not None:
        raise UserError(f"{_explain(rule, layout)}; {_way_out(rule, layout)}")


def refusals(layout: Layout) -> list[str]:
    """What every rule that refuses the layout says, as `check_layout` says it of the first one."""
    return [f"{_explain(rule, layout)}; {_way_out(rule, layout)}" for rule in RULES if _refuses(rule, layout)]


def is_valid(layout: Layout) -> bool:
    """Whether nothing that is known of the layout is refused."""
    return broken_rule(layout) is None


def broken_rule(layout: Layout, rules: Sequence[Rule] | None = None) -> Rule | None:
    """The first rule of the table that refuses the layout."""
    return next((rule for rule in (RULES if rules is None else rules) if rule.applies(layout)), None)


def refusal_table() -> list[tuple[Rule, Change, str]]:
    """Every rule with its example and the message with which that is refused.

    Raises:
        AssertionError: an example that is not refused.
    """
    table = []
    for rule in RULES:
        try:
            check_layout(Layout().changed(rule.example))
        except UserError as refusal:
            table.append((rule, rule.example, str(refusal)))
        else:
            raise AssertionError(f"the example of {rule.name!r} is not refused: {rule.example}")
    return table


def suggestions(rule: Rule, layout: Layout) -> list[Change]:
    """Changes of the rule's fields, nearest first, with which the layout passes the whole table."""
    return nearest(layout, rule.fields, is_valid)


def _refuses(rule: Rule, layout: Layout) -> bool:
    try:
        return rule.applies(layout)
    except ZeroDivisionError:
        # It asks about sizes that an earlier rule refuses.
        return False


def _explain(rule: Rule, layout: Layout) -> str:
    values = ", ".join(f"{name}={_as_written(layout[name])}" for name in rule.fields)
    return f"{values}: {rule.reason.format(layout=layout)}"


def _way_out(rule: Rule, layout: Layout) -> str:
    changes = suggestions(rule, layout)
    if changes:
        return f"nearest that work: {_listed(changes)}"
    # Another rule is in the way: to mend this one alone leads to that one.
    for change in nearest(layout, rule.fields, lambda other: not rule.applies(other)):
        other = layout.changed(change)
        blocking = broken_rule(other)
        if blocking is not None:
            return f"{_listed([change])} would mend this, but then {_explain(blocking, other)}"
    return f"no other value of {', '.join(rule.fields)} works here; choose another layout"


def _listed(changes: Sequence[Change]) -> str:
    """`a=1, 2; or b=true; or c=2 with d=4`."""
    single: dict[str, list[Any]] = {}
    texts = []
    for change in changes:
        if len(change) > 1:
            texts.append(" with ".join(f"{name}={_as_written(value)}" for name, value in change.items()))
        else:
            ((name, value),) = change.items()
            single.setdefault(name, []).append(value)
    for name, values in single.items():
        numbers = all(type(value) is int for value in values)
        texts.append(f"{name}={', '.join(map(_as_written, sorted(values) if numbers else values))}")
    return "; or ".join(texts)


def _as_written(value: Any) -> str:
    """As one would write it in the configuration."""
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _are_factors(sizes: list[int], product: int) -> bool:
    return len(sizes) == 2 and min(sizes) > 0 and math.prod(sizes) == product


def _older(capability: tuple[int, int] | None, needed: tuple[int, int]) -> bool:
    return capability is not None and capability < needed


def _engine_cp(layout: Layout) -> bool:
    return layout[IMPL] == "transformer_engine" and layout.parallel.context_parallel_size > 1
