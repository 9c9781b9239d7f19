"""Sizes of the CLIP text encoder, a BertModel; the defaults are the released one (47,020 words, 24 layers)."""

from __future__ import annotations

from megatron_video.config_io import config_dataclass


@config_dataclass
class ClipConfig:
    """Sizes under the names of a Hugging Face BERT config.json."""

    vocab_size: int = 47020
    """Rows of the word embedding."""
    hidden_size: int = 1024
    """Width of the states."""
    num_hidden_layers: int = 24
    """Layers."""
    num_attention_heads: int = 16
    """Attention heads."""
    intermediate_size: int = 4096
    """Width inside the feed-forward."""
    max_position_embeddings: int = 512
    """Longest text in tokens."""
    type_vocab_size: int = 2
    """Rows of the segment embedding."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the LayerNorms."""
    hidden_act: str = "gelu"
    """Activation inside the feed-forward; "gelu" is the exact one."""
    caption_max_length: int = 77
    """Tokens of a caption, to which all are padded or cut."""
    pooler: bool = True
    """Whether the pooler, whose output nobody reads, is among the tensors."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
