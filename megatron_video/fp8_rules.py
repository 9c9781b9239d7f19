"""Rows of the table of refusals (layout_rules.py) that are about FP8 and the offload of activations."""

from __future__ import annotations

from megatron_video.fp8 import RECIPES, Capability, RecipeNeeds
from megatron_video.layout import Layout, Rule

RECIPE = "fp8.recipe"
FIRST, LAST = "fp8.first_layers_bf16", "fp8.last_layers_bf16"
GATHER, ATTENTION = "fp8.param_gather", "fp8.dot_product_attention"
IMPL = "parallel.transformer_impl"
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
ZERO, FSDP = "parallel.use_distributed_optimizer", "parallel.use_megatron_fsdp"
OFFLOAD, OFFLOAD_MODULES = "parallel.fine_grained_activation_offloading", "parallel.offload_modules"
RECOMPUTE, RECOMPUTE_MODULES = "parallel.recompute_granularity", "parallel.recompute_modules"
LAYERS, HEAD_DIM = "model.num_layers", "model.attention_head_dim"
HEADS, FEED_FORWARD = "model.num_attention_heads", "model.ffn_multiplier"
PRECISION = "training.precision"
CUDA, CUDA_VERSION = "hardware.cuda", "hardware.cuda_version"
CAPABILITY, ENGINE = "hardware.compute_capability", "hardware.transformer_engine"

_ON_ENGINE = {IMPL: "transformer_engine"}
_HEADS_OF_64 = {HEAD_DIM: 64, "model.rope_channel_split": [32, 16, 16]}
_WITH_CUDA = {CUDA: True, ENGINE: "2.11.0"}
_HOPPER = {**_WITH_CUDA, CAPABILITY: (9, 0)}


def _needs(layout: Layout) -> RecipeNeeds | None:
    return RECIPES.get(layout[RECIPE])


def _older(found: Capability | None, needed: Capability | None) -> bool:
    return found is not None and needed is not None and found < needed


def _device_too_old(layout: Layout) -> bool:
    needs = _needs(layout)
    return needs is not None and _older(layout[CAPABILITY], needs.capability)


def _device_too_new(layout: Layout) -> bool:
    needs, found = _needs(layout), layout[CAPABILITY]
    return needs is not None and needs.below is not None and found is not None and found >= needs.below


def _cuda_too_old(layout: Layout) -> bool:
    needs = _needs(layout)
    return needs is not None and _older(layout[CUDA_VERSION], needs.cuda)


def _bf16_layers(layout: Layout) -> int:
    return max(layout[FIRST], layout[LAST])


def _widths_do_not_fit(layout: Layout) -> bool:
    needs = _needs(layout)
    hidden = layout[HEADS] * layout[HEAD_DIM]
    widths = (hidden, hidden // layout[TP], hidden * layout[FEED_FORWARD] // layout[TP])
    return needs is not None and any(width % needs.multiple for width in widths)


def _attention_without_kernels(layout: Layout) -> bool:
    needs = _needs(layout)
    return layout[ATTENTION] and needs is not None and needs.attention is None


def _attention_on_old_device(layout: Layout) -> bool:
    needs = _needs(layout)
    return layout[ATTENTION] and needs is not None and _older(layout[CAPABILITY], needs.attention)


def _recomputed_and_offloaded(layout: Layout) -> bool:
    if not layout[OFFLOAD] or layout[RECOMPUTE] is None:
        return False
    # The core of attention is a part of the branch.
    recomputed = {{"core_attn": "self_attention"}.get(name, name) for name in layout[RECOMPUTE_MODULES]}
    return layout[RECOMPUTE] == "full" or bool(recomputed & set(layout[OFFLOAD_MODULES]))


FP8_RULES: tuple[Rule, ...] = (
    Rule(
        name="FP8 on the local spec",
        fields=(RECIPE, IMPL),
        refuses=lambda layout: layout[RECIPE] is not None and layout[IMPL] == "local",
        reason="linear layers in FP8 are Transformer Engine's",
        example={RECIPE: "delayed"},
    ),
    Rule(
        name="FP8 in fp32",
        fields=(RECIPE, PRECISION),
        refuses=lambda layout: layout[RECIPE] is not None and layout[PRECISION] == "fp32",
        reason="what is not in FP8 is in bf16 then: weights, activations between the layers, attention",
        example={RECIPE: "tensorwise", PRECISION: "fp32", **_ON_ENGINE},
    ),
    Rule(
        name="FP8 recipe on an old device",
        fields=(RECIPE, CAPABILITY),
        refuses=_device_too_old,
        reason="matrix products of this recipe need compute capability 8.9 (delayed, tensorwise), 9.0 (blockwise) or "
        "10.0 (mxfp8)",
        example={RECIPE: "mxfp8", **_ON_ENGINE, **_HOPPER},
    ),
    Rule(
        name="FP8 recipe on a new device",
        fields=(RECIPE, CAPABILITY),
        refuses=_device_too_new,
        reason="Transformer Engine 2.11 has mxfp8 for compute capability 10 only",
        example={RECIPE: "mxfp8", **_ON_ENGINE, **_HOPPER, CAPABILITY: (12, 0)},
    ),
    Rule(
        name="FP8 recipe with an old CUDA",
        fields=(RECIPE, CUDA_VERSION),
        refuses=_cuda_too_old,
        reason="matrix products of blockwise recipes need CUDA 12.9",
        example={RECIPE: "blockwise", **_ON_ENGINE, **_WITH_CUDA, CUDA_VERSION: (12, 8)},
    ),
    Rule(
        name="FP8 options without a recipe",
        fields=(RECIPE, FIRST, LAST, GATHER, ATTENTION),
        refuses=lambda layout: (
            layout[RECIPE] is None and (_bf16_layers(layout) > 0 or layout[GATHER] or layout[ATTENTION])
        ),
        reason="without a recipe nothing is in FP8",
        example={GATHER: True},
    ),
    Rule(
        name="bf16 layers under delayed scaling",
        fields=(RECIPE, FIRST, LAST),
        refuses=lambda layout: layout[RECIPE] == "delayed" and _bf16_layers(layout) > 0,
        reason="delayed scaling exchanges its magnitudes once for all layers, and megatron-core has it in all or none",
        example={RECIPE: "delayed", FIRST: 1, **_ON_ENGINE},
    ),
    Rule(
        name="more bf16 layers than a stage has",
        fields=(FIRST, LAST, LAYERS, PP),
        refuses=lambda layout: _bf16_layers(layout) > layout[LAYERS] // layout[PP],
        reason="megatron-core takes at most the layers of one pipeline stage at either end",
        example={RECIPE: "tensorwise", FIRST: 3, LAYERS: 2, **_ON_ENGINE},
    ),
    Rule(
        name="widths for FP8",
        fields=(RECIPE, TP, HEADS, HEAD_DIM, FEED_FORWARD),
        refuses=_widths_do_not_fit,
        reason="the hidden and the feed-forward width, whole and of one tensor-parallel rank, must be multiples of 16 "
        "(delayed, tensorwise), 32 (mxfp8) or 128 (blockwise)",
        example={RECIPE: "blockwise", HEADS: 3, **_HEADS_OF_64, **_ON_ENGINE},
    ),
    Rule(
        name="FP8 weights without sharded optimizer",
        fields=(GATHER, ZERO),
        refuses=lambda layout: layout[GATHER] and not layout[ZERO],
        reason="megatron-core casts the optimizer's weights to FP8 in its distributed optimizer only",
        example={RECIPE: "tensorwise", GATHER: True, **_ON_ENGINE},
    ),
    Rule(
        name="FP8 weights under Megatron-FSDP",
        fields=(GATHER, FSDP),
        refuses=lambda layout: layout[GATHER] and layout[FSDP],
        reason="FSDP's shards hold bf16 weights here",
        example={RECIPE: "tensorwise", GATHER: True, ZERO: True, FSDP: True, **_ON_ENGINE},
    ),
    Rule(
        name="mxfp8 weights",
        fields=(GATHER, RECIPE),
        refuses=lambda layout: layout[GATHER] and layout[RECIPE] == "mxfp8",
        reason="their gather shares the gradients' memory, which this training step does not provide for",
        example={RECIPE: "mxfp8", GATHER: True, ZERO: True, **_ON_ENGINE},
    ),
    Rule(
        name="FP8 attention without kernels",
        fields=(ATTENTION, RECIPE),
        refuses=_attention_without_kernels,
        reason="Transformer Engine has FP8 attention under delayed and tensorwise scaling only",
        example={RECIPE: "blockwise", ATTENTION: True, **_ON_ENGINE},
    ),
    Rule(
        name="FP8 attention on an old device",
        fields=(ATTENTION, RECIPE, CAPABILITY),
        refuses=_attention_on_old_device,
        reason="its kernels that train need compute capability 9.0 under delayed scaling, 10.0 under tensorwise",
        example={RECIPE: "tensorwise", ATTENTION: True, **_ON_ENGINE, **_HOPPER},
    ),
    Rule(
        name="FP8 attention of other head sizes",
        fields=(ATTENTION, HEAD_DIM),
        refuses=lambda layout: layout[ATTENTION] and layout[HEAD_DIM] != 128,
        reason="its kernels that train have heads of 128 channels",
        example={RECIPE: "delayed", ATTENTION: True, **_HEADS_OF_64, **_ON_ENGINE},
    ),
    Rule(
        name="offload without CUDA",
        fields=(OFFLOAD, CUDA),
        refuses=lambda layout: layout[OFFLOAD] and not layout[CUDA],
        reason="on the CPU activations are in the host's memory already",
        example={OFFLOAD: True, CUDA: False},
    ),
    Rule(
        name="offload without Transformer Engine",
        fields=(OFFLOAD, ENGINE),
        refuses=lambda layout: layout[OFFLOAD] and layout[ENGINE] is None,
        reason="megatron-core's offload uses the package transformer-engine (pip install megatron-video[gpu])",
        example={OFFLOAD: True, CUDA: True},
    ),
    Rule(
        name="offload of nothing",
        fields=(OFFLOAD, OFFLOAD_MODULES),
        refuses=lambda layout: layout[OFFLOAD] and not layout[OFFLOAD_MODULES],
        reason="nothing is named that is to be offloaded",
        example={OFFLOAD: True, OFFLOAD_MODULES: []},
    ),
    Rule(
        name="offload of what is recomputed",
        fields=(OFFLOAD, OFFLOAD_MODULES, RECOMPUTE, RECOMPUTE_MODULES),
        refuses=_recomputed_and_offloaded,
        reason="an activation is either kept on the host or computed again; full recomputation leaves none to offload",
        example={OFFLOAD: True, RECOMPUTE: "full"},
    ),
    Rule(
        name="offload with FP8 weights",
        fields=(OFFLOAD, GATHER),
        refuses=lambda layout: layout[OFFLOAD] and layout[GATHER],
        reason="the offload cannot tell weights that are kept in FP8 from activations",
        example={RECIPE: "tensorwise", GATHER: True, ZERO: True, OFFLOAD: True, **_ON_ENGINE},
    ),
)
