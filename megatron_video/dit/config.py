"""The shape of the diffusion transformer; the defaults are the released 30B model (paper Table 1)."""

from __future__ import annotations

from dataclasses import field

from megatron_video.config_io import config_dataclass


@config_dataclass
class DiTConfig:
    """Sizes of the video DiT. Hidden width D = num_attention_heads * attention_head_dim."""

    num_layers: int = 48
    """Transformer blocks."""
    num_attention_heads: int = 48
    """Attention heads of self- and cross-attention."""
    attention_head_dim: int = 128
    """Channels per head."""
    in_channels: int = 64
    """Latent channels at the input."""
    out_channels: int = 64
    """Latent channels of the predicted velocity."""
    patch_size: int = 1
    """Side of a spatial patch in latent pixels; frames are never patched together."""
    ffn_multiplier: int = 4
    """Feed-forward width over hidden width."""
    caption_channels: list[int] | int = field(default_factory=lambda: [6144, 1024])
    """Widths of the text states: [Step-LLM, CLIP], or one number for Step-LLM alone."""
    use_additional_conditions: bool = False
    """Add embeddings of latent resolution, number of latent frames and fps to the time embedding."""
    rope_channel_split: list[int] | None = None
    """Head channels rotated by (frame, row, column); null for [head/2, head/4, head/4]."""
    norm_eps: float = 1e-6
    """Epsilon of the output norm and of the caption norm (both without affine); block LayerNorms use 1e-5."""
    released_precision: bool = False
    """Round timestep and RoPE angles to the parameters' dtype before use, as the released bf16 pipeline does."""
    hidden_dropout: float = 0.0
    """Share of elements dropped from the output of attention, cross-attention and feed-forward; the paper uses none."""
    init_std: float | None = None
    """Standard deviation of hidden linear weights at initialisation; null for sqrt(2 / (5 D))."""

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other.

        Raises:
            ValueError: naming the fields, the values and what is allowed.
        """
        positive = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
        for name in (*positive, "patch_size", "ffn_multiplier"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout={self.hidden_dropout} must be at least 0 and below 1")
        self._check_rope()
        if self.use_additional_conditions and self.hidden_size % 2:
            raise ValueError(f"use_additional_conditions=true needs an even hidden width, not {self.hidden_size}")
        if isinstance(self.caption_channels, list) and len(self.caption_channels) != 2:
            raise ValueError(
                f"caption_channels={self.caption_channels} must be [Step-LLM width, CLIP width] or a number"
            )

    def _check_rope(self) -> None:
        if self.rope_channel_split is None:
            if self.attention_head_dim % 8:
                raise ValueError(
                    f"attention_head_dim={self.attention_head_dim} must be a multiple of 8, or set rope_channel_split"
                )
            half, quarter = self.attention_head_dim // 2, self.attention_head_dim // 4
            self.rope_channel_split = [half, quarter, quarter]
        split = self.rope_channel_split
        if len(split) != 3 or sum(split) != self.attention_head_dim or any(width % 2 for width in split):
            raise ValueError(
                f"rope_channel_split={split} must be three even numbers that add up to "
                f"attention_head_dim={self.attention_head_dim}"
            )

    @property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def llm_channels(self) -> int:
        """Width of the Step-LLM states."""
        return self.caption_channels if isinstance(self.caption_channels, int) else self.caption_channels[0]

    @property
    def clip_channels(self) -> int | None:
        """Width of the CLIP states, or None where the model takes Step-LLM states alone."""
        return None if isinstance(self.caption_channels, int) else self.caption_channels[1]
