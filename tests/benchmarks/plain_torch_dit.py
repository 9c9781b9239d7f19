"""The DiT as a good user of PyTorch would write it for one process: the peer that the benchmarks measure against.

nn.Linear, F.scaled_dot_product_attention, F.layer_norm and F.rms_norm, batch first, no parallelism. Parameters have the
names and shapes of the released weights. It shares no code with `megatron_video`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Shape of the model."""

    layers: int
    heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    channels: int
    llm_channels: int
    clip_channels: int

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Channels of a head rotated by (frame, row, column)."""
        return self.head_dim // 2, self.head_dim // 4, self.head_dim // 4


class RMSNorm(nn.Module):
    """RMSNorm over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class SelfAttention(nn.Module):
    """Attention of all video tokens to all, with QK-norm and RoPE-3D."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        inner = sizes.heads * sizes.head_dim
        self.wqkv = nn.Linear(sizes.hidden, 3 * inner, bias=False)
        self.wo = nn.Linear(inner, sizes.hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(sizes.head_dim), RMSNorm(sizes.head_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[b, s, D] -> [b, s, D]."""
        b, s, _ = x.shape
        qkv = self.wqkv(x).view(b, s, self.sizes.heads, 3, self.sizes.head_dim)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        q = rotate(self.q_norm(q), rope, self.sizes.rope_split)
        k = rotate(self.k_norm(k), rope, self.sizes.rope_split)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.wo(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text, with QK-norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        inner = sizes.heads * sizes.head_dim
        self.wq = nn.Linear(sizes.hidden, inner, bias=False)
        self.wkv = nn.Linear(sizes.hidden, 2 * inner, bias=False)
        self.wo = nn.Linear(inner, sizes.hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(sizes.head_dim), RMSNorm(sizes.head_dim)

    def forward(self, x: Tensor, text: Tensor, visible: Tensor | None) -> Tensor:
        """[b, s, D] and text [b, L, D] -> [b, s, D]; `visible` bool [b, 1, 1, L]."""
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, self.sizes.heads, -1).transpose(1, 2)
        k, v = self.wkv(text).view(b, text.shape[1], self.sizes.heads, 2, -1).permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=visible)
        return self.wo(out.transpose(1, 2).flatten(2))


class GELUProjection(nn.Module):
    """Linear and tanh-GELU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.proj = nn.Linear(sizes.hidden, sizes.feed_forward, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, D] -> [b, s, feed_forward]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linears with tanh-GELU between them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        # The released names number a dropout between the two.
        self.net = nn.ModuleList(
            [GELUProjection(sizes), nn.Identity(), nn.Linear(sizes.feed_forward, sizes.hidden, bias=False)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, D] -> [b, s, D]."""
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """One DiT block."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(sizes.hidden), nn.LayerNorm(sizes.hidden)
        self.attn1, self.attn2, self.ff = SelfAttention(sizes), CrossAttention(sizes), FeedForward(sizes)
        self.scale_shift_table = nn.Parameter(torch.empty(6, sizes.hidden))

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, visible: Tensor | None, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[b, s, D] -> [b, s, D]; modulation [b, 6, D], text [b, L, D], visible bool [b, 1, 1, L]."""
        table = self.scale_shift_table + modulation
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.chunk(6, dim=1)
        x = x + gate_a * self.attn1(self.norm1(x) * (1 + scale_a) + shift_a, rope)
        x = x + self.attn2(x, text, visible)
        return x + gate_f * self.ff(self.norm2(x) * (1 + scale_f) + shift_f)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, inputs: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., width]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class PlainDiT(nn.Module):
    """The whole model, patch size 1."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.hidden
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(sizes.channels, width, 1)})
        embedder = nn.ModuleDict({"timestep_embedder": MLP(256, width, nn.SiLU())})
        self.adaln_single = nn.ModuleDict({"emb": embedder, "linear": nn.Linear(width, 6 * width)})
        self.caption_projection = MLP(sizes.llm_channels, width, nn.GELU(approximate="tanh"))
        self.clip_projection = nn.Linear(sizes.clip_channels, width)
        self.transformer_blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, sizes.channels)

    def forward(self, latents: Tensor, timestep: Tensor, llm: Tensor, clip: Tensor, lengths: Tensor) -> Tensor:
        """Velocity at latents [b, T, C, h, w] for timestep [b], llm [b, L1, d1], clip [b, L2, d2], lengths [b]."""
        b, t, c, h, w = latents.shape
        x = self.pos_embed["proj"](latents.flatten(0, 1)).view(b, t, -1, h * w).transpose(2, 3).flatten(1, 2)
        embedding = self.adaln_single["emb"]["timestep_embedder"](sinusoid(timestep * 1000))
        modulation = self.adaln_single["linear"](F.silu(embedding)).view(b, 6, -1)
        text = self.caption_projection(F.layer_norm(llm, llm.shape[-1:], eps=1e-6))
        text = torch.cat([self.clip_projection(clip), text], dim=1)
        visible = (torch.arange(text.shape[1]) < lengths[:, None])[:, None, None]
        rope = rope_tables((t, h, w), self.sizes.rope_split, x.device, x.dtype)
        for block in self.transformer_blocks:
            x = block(x, modulation, text, visible, rope)
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return x.view(b, t, h, w, c).permute(0, 1, 4, 2, 3)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], split: tuple[int, int, int]) -> Tensor:
    """Rotate [b, heads, s, head_dim] by (cos, sin) [s, head_dim], whose signs are those of the swapped halves."""
    cos, sin = rope
    swapped = [half for part in x.split(split, -1) for half in reversed(part.chunk(2, -1))]
    return x * cos + torch.cat(swapped, -1) * sin


@lru_cache
def rope_tables(
    grid: tuple[int, int, int], split: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [s, head_dim] of a latent grid (T, h, w)."""
    positions = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).float()
    cos, sin = [], []
    for position, width in zip(positions.unbind(1), split, strict=True):
        angle = position[:, None] * 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
        cos += [angle.cos(), angle.cos()]
        sin += [-angle.sin(), angle.sin()]
    return torch.cat(cos, -1).to(dtype), torch.cat(sin, -1).to(dtype)


def sinusoid(values: Tensor) -> Tensor:
    """[n] -> [n, 256]."""
    angle = values[:, None] * torch.exp(-math.log(1e4) * torch.arange(128, device=values.device) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
