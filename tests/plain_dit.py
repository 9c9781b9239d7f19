"""The DiT a second time, in plain PyTorch straight from its equations, on weights under the released names.

It shares no code with `megatron_video`: an outside truth for what the recorded outputs do not cover.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def forward(
    weights: Weights,
    heads: int,
    split: list[int],
    latents: Tensor,
    timestep: Tensor,
    llm: Tensor,
    clip: Tensor | None,
    lengths: Tensor,
    fps: Tensor | None = None,
) -> Tensor:
    """Velocity [b, T, C, h, w] of a whole model."""
    b, t, _, h, w = latents.shape
    kernel = weights["pos_embed.proj.weight"]
    p = kernel.shape[-1]
    x = F.conv2d(latents.flatten(0, 1), kernel, weights["pos_embed.proj.bias"], stride=p)
    width, rows, columns = x.shape[1:]
    x = x.view(b, t, width, rows, columns).permute(0, 1, 3, 4, 2).reshape(b, -1, width)

    e = _mlp(weights, "adaln_single.emb.timestep_embedder", _sinusoid(timestep * 1000))
    if "adaln_single.emb.nframe_embedder.linear_1.weight" in weights:
        sizes = torch.tensor([[rows, columns]] * b).float().flatten()
        e = e + _mlp(weights, "adaln_single.emb.resolution_embedder", _sinusoid(sizes)).view(b, -1)
        e = e + _mlp(weights, "adaln_single.emb.nframe_embedder", _sinusoid(torch.full((b,), float(t))))
        if fps is not None:
            e = e + _mlp(weights, "adaln_single.emb.fps_embedder", _sinusoid(fps))
    modulation = _linear(weights, "adaln_single.linear", F.silu(e)).view(b, 6, width)

    text = F.layer_norm(llm, llm.shape[-1:], eps=1e-6)
    text = _linear(weights, "caption_projection.linear_1", text)
    text = _linear(weights, "caption_projection.linear_2", F.gelu(text, approximate="tanh"))
    if clip is not None:
        text = torch.cat([_linear(weights, "clip_projection", clip), text], dim=1)
    visible = torch.arange(text.shape[1])[None] < lengths[:, None]

    position = torch.cartesian_prod(torch.arange(t), torch.arange(rows), torch.arange(columns)).float()
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    for i in range(depth):
        block = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"transformer_blocks.{i}.")}
        x = _block(block, x, modulation, text, visible, heads, split, position)

    shift, scale = (weights["scale_shift_table"][None] + e[:, None]).chunk(2, dim=1)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    x = _linear(weights, "proj_out", x).view(b, t, rows, columns, p, p, -1)
    return torch.einsum("nthwpqc->ntchpwq", x).reshape(b, t, -1, h, w)


def _block(
    block: Weights,
    x: Tensor,
    modulation: Tensor,
    text: Tensor,
    visible: Tensor,
    heads: int,
    split: list[int],
    position: Tensor,
) -> Tensor:
    m = (block["scale_shift_table"][None] + modulation).chunk(6, dim=1)
    normed = F.layer_norm(x, x.shape[-1:], block["norm1.weight"], block["norm1.bias"], eps=1e-5) * (1 + m[1]) + m[0]
    b, s, _ = x.shape
    qkv = (normed @ block["attn1.wqkv.weight"].T).view(b, s, heads, 3, -1)
    q, k, v = qkv.unbind(3)
    q = _rope(_rms(q, block["attn1.q_norm.weight"]), position, split)
    k = _rope(_rms(k, block["attn1.k_norm.weight"]), position, split)
    x = x + m[2] * (_attend(q, k, v, None) @ block["attn1.wo.weight"].T)

    q = (x @ block["attn2.wq.weight"].T).view(b, s, heads, -1)
    k, v = (text @ block["attn2.wkv.weight"].T).view(b, text.shape[1], heads, 2, -1).unbind(3)
    q, k = _rms(q, block["attn2.q_norm.weight"]), _rms(k, block["attn2.k_norm.weight"])
    x = x + _attend(q, k, v, visible) @ block["attn2.wo.weight"].T

    normed = F.layer_norm(x, x.shape[-1:], block["norm2.weight"], block["norm2.bias"], eps=1e-5) * (1 + m[4]) + m[3]
    fed = F.gelu(normed @ block["ff.net.0.proj.weight"].T, approximate="tanh") @ block["ff.net.2.weight"].T
    return x + m[5] * fed


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _rope(x: Tensor, position: Tensor, split: list[int]) -> Tensor:
    """Each axis as a rotation in the complex plane: pair (j, j + width / 2) is one complex number."""
    parts = []
    for axis, part in enumerate(x.split(split, dim=-1)):
        half = part.shape[-1] // 2
        angle = position[:, axis, None] * 10000.0 ** (-torch.arange(half) / half)
        turned = torch.complex(part[..., :half], part[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        parts += [turned.real, turned.imag]
    return torch.cat(parts, dim=-1)


def _sinusoid(values: Tensor) -> Tensor:
    angle = values[:, None] * torch.exp(-math.log(1e4) * torch.arange(128) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    return _linear(weights, f"{name}.linear_2", F.silu(_linear(weights, f"{name}.linear_1", x)))
