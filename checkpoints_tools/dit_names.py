"""The released names of the DiT's tensors beside ours. One row a tensor; shapes and values are equal, never reordered.

megatron-core's fused projections use the released layouts: `linear_qkv` rows are [heads, 3, head_dim], `linear_kv`
rows [heads, 2, head_dim]; splitting rows over tensor-parallel ranks keeps heads whole.
"""

from __future__ import annotations

from megatron_video.dit import DiTConfig

# ours -> released, outside the blocks, in the order of the released files: the tables come in the order below, with the
# blocks after the first
PATCH_NAMES = {
    "head.modulation_table": "scale_shift_table",
    "patch_embedding.weight": "pos_embed.proj.weight",
    "patch_embedding.bias": "pos_embed.proj.bias",
}
HEAD_NAMES = {
    "head.projection.weight": "proj_out.weight",
    "head.projection.bias": "proj_out.bias",
}
TIME_NAMES = {
    "time_conditioning.time_embedder.linear_1.weight": "adaln_single.emb.timestep_embedder.linear_1.weight",
    "time_conditioning.time_embedder.linear_1.bias": "adaln_single.emb.timestep_embedder.linear_1.bias",
    "time_conditioning.time_embedder.linear_2.weight": "adaln_single.emb.timestep_embedder.linear_2.weight",
    "time_conditioning.time_embedder.linear_2.bias": "adaln_single.emb.timestep_embedder.linear_2.bias",
}
# present with use_additional_conditions
ADDITIONAL_NAMES = {
    f"time_conditioning.{ours}_embedder.linear_{i}.{kind}": f"adaln_single.emb.{theirs}_embedder.linear_{i}.{kind}"
    for ours, theirs in (("resolution", "resolution"), ("num_frames", "nframe"), ("fps", "fps"))
    for i in (1, 2)
    for kind in ("weight", "bias")
}
MODULATION_NAMES = {
    "time_conditioning.modulation_linear.weight": "adaln_single.linear.weight",
    "time_conditioning.modulation_linear.bias": "adaln_single.linear.bias",
}
# present when the model takes CLIP states
CLIP_NAMES = {
    "text_projection.clip_linear.weight": "clip_projection.weight",
    "text_projection.clip_linear.bias": "clip_projection.bias",
}
LLM_NAMES = {
    "text_projection.llm_linear_1.weight": "caption_projection.linear_1.weight",
    "text_projection.llm_linear_1.bias": "caption_projection.linear_1.bias",
    "text_projection.llm_linear_2.weight": "caption_projection.linear_2.weight",
    "text_projection.llm_linear_2.bias": "caption_projection.linear_2.bias",
}

# inside block i: ours after `layers.{i}.`, released after `transformer_blocks.{i}.`
LAYER_NAMES = {
    "modulation_table": "scale_shift_table",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "self_attention.linear_qkv.weight": "attn1.wqkv.weight",
    "self_attention.linear_proj.weight": "attn1.wo.weight",
    "self_attention.q_layernorm.weight": "attn1.q_norm.weight",
    "self_attention.k_layernorm.weight": "attn1.k_norm.weight",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "cross_attention.linear_q.weight": "attn2.wq.weight",
    "cross_attention.linear_kv.weight": "attn2.wkv.weight",
    "cross_attention.linear_proj.weight": "attn2.wo.weight",
    "cross_attention.q_layernorm.weight": "attn2.q_norm.weight",
    "cross_attention.k_layernorm.weight": "attn2.k_norm.weight",
    "mlp.linear_fc1.weight": "ff.net.0.proj.weight",
    "mlp.linear_fc2.weight": "ff.net.2.weight",
}


def released_names(dit: DiTConfig) -> dict[str, str]:
    """Our name -> released name, for every tensor of a model of this shape, in the order of the released files."""
    layers = {
        f"layers.{i}.{ours}": f"transformer_blocks.{i}.{theirs}"
        for i in range(dit.num_layers)
        for ours, theirs in LAYER_NAMES.items()
    }
    additional = ADDITIONAL_NAMES if dit.use_additional_conditions else {}
    clip = CLIP_NAMES if dit.clip_channels is not None else {}
    return PATCH_NAMES | layers | HEAD_NAMES | TIME_NAMES | additional | MODULATION_NAMES | clip | LLM_NAMES
