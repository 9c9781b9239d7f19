"""Step-LLM: the causal decoder whose last hidden states condition the DiT (Step-Video-T2V, arXiv 2502.10248, 4.2).

Pre-norm, grouped-query attention, SwiGLU, no biases, no final norm, no head. Positions enter as a bias on the scores
that falls with the square root of the distance ("sqrt-ALiBi"). Parameter names are those of the released checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_video.config_io import build_config, config_dataclass
from megatron_video.errors import UserError

_FFN_MULTIPLE = 256

# Keys that a config.json must give: a default here would build another model than the weights are for.
_REQUIRED = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_attention_groups",
    "ffn_hidden_size",
    "padded_vocab_size",
)
# Switches of the released code that are false in the released model and are not implemented.
_MUST_BE_FALSE = ("fp32_residual_connection", "embedding_weights_in_fp32")


@config_dataclass
class StepLLMConfig:
    """Sizes of Step-LLM under the names of its config.json; the defaults are the released 19.6B model."""

    hidden_size: int = 6144
    """Width of the residual stream and of the output."""
    num_layers: int = 48
    """Decoder layers."""
    num_attention_heads: int = 48
    """Query heads."""
    num_attention_groups: int = 8
    """Key-value heads; each serves num_attention_heads / num_attention_groups query heads."""
    ffn_hidden_size: int = 16896
    """Width inside the feed-forward; rounded up to a multiple of 256."""
    padded_vocab_size: int = 65536
    """Rows of the embedding; the tokenizer may have fewer pieces."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the RMSNorms."""
    caption_max_length: int = 320
    """Tokens of a caption including BOS and EOS; longer captions are cut."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.num_attention_heads % self.num_attention_groups:
            raise ValueError(
                f"num_attention_groups={self.num_attention_groups} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.caption_max_length < 3:
            raise ValueError(f"caption_max_length={self.caption_max_length} leaves no room between BOS and EOS")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """`ffn_hidden_size` rounded up as the released code does."""
        return -(-self.ffn_hidden_size // _FFN_MULTIPLE) * _FFN_MULTIPLE

    @classmethod
    def from_json(cls, values: dict[str, Any], origin: str) -> StepLLMConfig:
        """The configuration in a config.json; keys that do not shape the computation are passed over.

        Raises:
            UserError: a size is missing, a value is of the wrong type, or a switch is on that is not supported.
        """
        missing = [key for key in _REQUIRED if key not in values]
        if missing:
            raise UserError(f"{origin} is not a Step-LLM configuration: {', '.join(missing)} missing")
        for key in _MUST_BE_FALSE:
            if values.get(key):
                raise UserError(f"{origin}: {key}={values[key]!r} is not supported; only false is")
        known = {field.name for field in fields(cls)}
        return build_config(cls, {key: value for key, value in values.items() if key in known}, origin)


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads] fp32 slopes of the position bias: powers of two over n = 2^floor(log2 H) heads, the rest between."""
    # As in ALiBi: a geometric series for the power of two below, and every second term of the next finer one.
    n = 2 ** int(math.log2(num_heads))
    exponents = [-8.0 * k / n for k in range(1, n + 1)]
    exponents += [-4.0 * (2 * k - 1) / n for k in range(1, num_heads - n + 1)]
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float32)


def position_bias(num_heads: int, length: int) -> Tensor:
    """[1, num_heads, length, length] fp32 added to the scores: -slope * sqrt(i - j) for keys j <= i, else -inf."""
    position = torch.arange(length, dtype=torch.float32)
    # Rows are queries i, columns keys j.
    distance = position[:, None] - position[None, :]
    bias = -alibi_slopes(num_heads).view(-1, 1, 1) * distance.clamp(min=0).sqrt()
    return bias.masked_fill(distance < 0, float("-inf"))[None]


class RMSNorm(nn.Module):
    """Normalise in fp32, cast back, then multiply by the weight: the released order of roundings."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width] in x's dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention; `wqkv` rows are all query heads, then (key, value) per group."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_attention_groups,
            config.head_dim,
        )
        rows = (self.heads + 2 * self.groups) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [b, n, hidden], bias [1, heads, n, n] in x's dtype -> [b, n, hidden]."""
        batch, length, width = x.shape
        # All query rows first, then keys and values in turn: unlike Megatron's own interleaved layout.
        query, key_value = self.wqkv(x).split([width, 2 * self.groups * self.head_dim], dim=-1)
        query = query.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        key_value = key_value.view(batch, length, self.groups, 2, self.head_dim)
        # [b, n, G, 2, d] -> two of [b, H, n, d]; head h reads group h // (H / G).
        repeated = key_value.repeat_interleave(self.heads // self.groups, dim=2).permute(3, 0, 2, 1, 4)
        # The scale is the default, head_dim ** -0.5, and comes before the bias.
        attended = F.scaled_dot_product_attention(query, repeated[0], repeated[1], attn_mask=bias)
        out: Tensor = self.wo(attended.transpose(1, 2).reshape(batch, length, width))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(SiLU(a) * g) with [a; g] = w1(x)."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, 2 * config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        # SiLU acts on the first half, which not all SwiGLU checkpoints agree on.
        activated, gate = self.w1(x).chunk(2, dim=-1)
        out: Tensor = self.w2(F.silu(activated) * gate)
        return out


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [b, n, hidden], bias [1, heads, n, n] -> [b, n, hidden]."""
        x = x + self.attention(self.attention_norm(x), bias)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class TokenEmbeddings(nn.Module):
    """Holds the embedding under its released name."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Decoder(nn.Module):
    """Holds the layers under their released name."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))


class StepLLM(nn.Module):
    """Token ids to hidden states.

    Right padding needs no mask: a token sees only itself and what is left of it. States at pad positions are
    computed and mean nothing.
    """

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = TokenEmbeddings(config)
        self.transformer = Decoder(config)
        self._bias: Tensor | None = None

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [b, n] int64 -> [b, n, hidden] in the parameters' dtype."""
        x: Tensor = self.tok_embeddings.word_embeddings(token_ids)
        bias = self._position_bias(x)
        for layer in self.transformer.layers:
            x = layer(x, bias)
        return x

    def _position_bias(self, x: Tensor) -> Tensor:
        # Kept for the next batch of the same length; other lengths replace it.
        length, bias = x.shape[1], self._bias
        if bias is None or bias.shape[-1] != length or bias.dtype != x.dtype or bias.device != x.device:
            bias = position_bias(self.config.num_attention_heads, length).to(device=x.device, dtype=x.dtype)
            self._bias = bias
        return bias
