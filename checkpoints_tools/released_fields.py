"""Tables of the released config.json files: which fields say what our dataclasses say, and what the others must be.

The values are those of the released files. Some have no effect on what is computed here, and yet the public inference
code would not start without them (Step-LLM's seq_length, hidden_dropout, use_flash_attn and others).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReleasedFields:
    """Fields of one kind's config.json."""

    marks: tuple[Mapping[str, Any], ...]
    """Values by which the file is known to be this kind's, any one group of them; `...`: any value."""
    shared: tuple[str, ...]
    """In our dataclass under the same name."""
    required: tuple[str, ...] = ()
    """Of which the file must give these: a default would build another model than the weights are for."""
    own: tuple[str, ...] = ()
    """Like `shared`, but no released file has them: written only where they are not the default."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values the released code has; with another value it would compute something else, which is refused."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Like `fixed`, but the released file does not say it, nor is it written."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Written as they are released; read with any value, for they do not change what inference computes."""
    derived: Mapping[str, str] = field(default_factory=dict)
    """Written from an attribute of our dataclass; not read."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Written as the type of the weights with this text before it; not read, for the tensors say it."""
    closed: bool = False
    """Whether a field in none of these tables is refused; otherwise it is named and left out."""
    unkept: tuple[str, ...] = ()
    """Of our dataclass, without a place in the file and without effect on what a trained model computes."""


DIT_FIELDS = ReleasedFields(
    marks=({"_class_name": "StepVideoModel"},),
    shared=(
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "patch_size",
        "caption_channels",
        "use_additional_conditions",
        "norm_eps",
    ),
    fixed={"dropout": 0.0, "norm_elementwise_affine": False, "norm_type": "ada_norm_single"},
    written={"_class_name": "StepVideoModel", "_diffusers_version": "0.31.0", "attention_type": "parallel"},
    closed=True,
    # Dropout and initialisation belong to training. The released code always rounds as released_precision does.
    unkept=("hidden_dropout", "init_std", "released_precision"),
)

# The released file has no config.json: its sizes are in the released code. This is ours, as `load_vae` reads it.
VAE_FIELDS = ReleasedFields(
    marks=({"latent_channels": ..., "encoder_multipliers": ...},),
    shared=(
        "latent_channels",
        "encoder_channels",
        "encoder_multipliers",
        "decoder_channels",
        "decoder_multipliers",
        "num_res_blocks",
        "chunk_frames",
        "chunk_latents",
    ),
    closed=True,
)

CLIP_FIELDS = ReleasedFields(
    marks=({"model_type": "bert"}, {"architectures": ["BertModel"]}),
    shared=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "layer_norm_eps",
        "hidden_act",
    ),
    required=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ),
    own=("caption_max_length",),
    fixed={"model_type": "bert", "position_embedding_type": "absolute"},
    implied={"is_decoder": False, "add_cross_attention": False},
    written={
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "classifier_dropout": None,
        "directionality": "bidi",
        "eos_token_id": 2,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "output_past": True,
        "pad_token_id": 0,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "transformers_version": "4.22.1",
        "use_cache": True,
    },
    dtypes={"torch_dtype": ""},
    # Said by the tensors that are there.
    unkept=("pooler",),
)

LLM_FIELDS = ReleasedFields(
    marks=({"architectures": ["Step1Model"]}, {"num_attention_groups": ..., "padded_vocab_size": ...}),
    shared=(
        "hidden_size",
        "num_layers",
        "num_attention_heads",
        "num_attention_groups",
        "ffn_hidden_size",
        "padded_vocab_size",
        "layernorm_epsilon",
    ),
    required=(
        "hidden_size",
        "num_layers",
        "num_attention_heads",
        "num_attention_groups",
        "ffn_hidden_size",
        "padded_vocab_size",
    ),
    own=("caption_max_length",),
    fixed={"embedding_weights_in_fp32": False, "fp32_residual_connection": False, "attention_impl": "GQA"},
    implied={"model_type": "step1"},
    written={
        "allow_transformer_engine": False,
        "architectures": ["Step1Model"],
        "attention_dropout": 0.0,
        "base_batch_size": 128,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 16384,
        "overlap_p2p_comm": True,
        "seq_length": 16384,
        "swiglu_recompute_silu_dot": True,
        "tokens_to_generate": 512,
        "transformers_version": "4.48.3",
        "use_flash_attn": True,
        "virtual_pipeline_model_parallel_size": 3,
    },
    derived={"kv_channels": "head_dim", "orig_vocab_size": "padded_vocab_size"},
    dtypes={"params_dtype": "torch.", "torch_dtype": ""},
)
