"""RMSNorm over the channels of a head, followed by RoPE-3D where a table is given, in one pass over the tokens.

A head is handled as the pairs of channels that the rotation mixes, half an axis's width apart: nothing is loaded twice
and no rotated copy is made. Backward keeps the input alone, which is a view of the projection's output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_video.dit.kernels.launch import token_groups

_HEADS = 16
_PROGRAMS_PER_PROCESSOR = 8


class RotatedRMSNorm(torch.autograd.Function):
    """`rotate(RMSNorm(x))`, or `RMSNorm(x)` without tables, rounded where the plain code rounds."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor | None,
        sin: Tensor | None,
        split: tuple[int, ...] | None,
    ) -> Tensor:
        """See `fused.rotated_rms_norm`; `cos`, `sin` and `split` are given together or all None."""
        x = _dense_channels(x)
        tokens, batch, heads, _ = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        constants = _constants(x, split)
        _forward[(tokens * batch, triton.cdiv(heads, constants["HEADS"]))](
            x, weight, cos, sin, out, *_strides(x), 0 if cos is None else cos.stride(0), batch, heads, eps,
            **constants, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps, ctx.split = eps, split
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight."""
        x, weight, cos, sin = ctx.saved_tensors
        grad = _dense_channels(grad)
        tokens, batch, heads, channels = x.shape
        constants = _constants(x, ctx.split)
        blocks = triton.cdiv(heads, constants["HEADS"])
        groups = token_groups(tokens * batch, x.device, _PROGRAMS_PER_PROCESSOR, blocks)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty(groups, blocks, channels, dtype=torch.float32, device=x.device)
        _backward[(groups, blocks)](
            grad, x, weight, cos, sin, grad_x, sums, *_strides(grad), *_strides(x),
            0 if cos is None else cos.stride(0), tokens * batch, batch, heads, ctx.eps, **constants, num_warps=4,
        )  # fmt: skip
        return grad_x, sums.sum((0, 1)).to(weight.dtype), None, None, None, None


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _constants(x: Tensor, split: tuple[int, ...] | None) -> dict[str, Any]:
    heads, channels = x.shape[2:]
    # Without a rotation any pairing will do.
    widths = split or (channels, 0, 0)
    return {
        "CHANNELS": channels,
        "FRAME": widths[0],
        "ROW": widths[1],
        "COLUMN": widths[2],
        "RUN": math.gcd(*(width // 2 for width in widths), 16),
        "PAIRS": triton.next_power_of_2(channels // 2),
        "HEADS": min(_HEADS, triton.next_power_of_2(heads)),
        "ROTATE": split is not None,
    }


@triton.jit
def _forward(
    x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, out: tl.tensor, token_stride: tl.tensor,
    sample_stride: tl.tensor, head_stride: tl.tensor, table_stride: tl.tensor, batch: tl.tensor, heads: tl.tensor,
    eps: tl.tensor, CHANNELS: tl.constexpr, FRAME: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    RUN: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, ROTATE: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, sample = row // batch, row % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    first, half, paired = _pairs(FRAME, ROW, COLUMN, RUN, PAIRS, CHANNELS)
    valid = (head < heads)[:, None] & paired[None, :]
    source = x + token * token_stride + sample * sample_stride + head[:, None] * head_stride + first[None, :]
    a = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(source + half[None, :], mask=valid, other=0.0).to(tl.float32)
    inverse = _inverse_rms(a, b, eps, CHANNELS)
    dtype = out.dtype.element_ty
    a = _weighted(a * inverse, weight + first, paired, dtype)
    b = _weighted(b * inverse, weight + first + half, paired, dtype)
    if ROTATE:
        table = token * table_stride + first
        cos_a, cos_b = _two(cos + table, half, paired)
        sin_a, sin_b = _two(sin + table, half, paired)
        # Products and sums are rounded one by one, as in the plain code.
        turned_a = _rounded(a * cos_a, dtype) + _rounded(b * sin_a, dtype)
        turned_b = _rounded(b * cos_b, dtype) + _rounded(a * sin_b, dtype)
    else:
        turned_a, turned_b = a, b
    target = out + (row * heads + head[:, None]) * CHANNELS + first[None, :]
    tl.store(target, turned_a.to(dtype), mask=valid)
    tl.store(target + half[None, :], turned_b.to(dtype), mask=valid)


@triton.jit
def _backward(
    grad: tl.tensor, x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, grad_x: tl.tensor,
    sums: tl.tensor, grad_token_stride: tl.tensor, grad_sample_stride: tl.tensor, grad_head_stride: tl.tensor,
    token_stride: tl.tensor, sample_stride: tl.tensor, head_stride: tl.tensor, table_stride: tl.tensor,
    rows: tl.tensor, batch: tl.tensor, heads: tl.tensor, eps: tl.tensor, CHANNELS: tl.constexpr, FRAME: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, RUN: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
) -> None:  # fmt: skip
    group, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = block * HEADS + tl.arange(0, HEADS)
    first, half, paired = _pairs(FRAME, ROW, COLUMN, RUN, PAIRS, CHANNELS)
    valid = (head < heads)[:, None] & paired[None, :]
    weight_a, weight_b = _two(weight + first, half, paired)
    sum_a = tl.zeros([HEADS, PAIRS], dtype=tl.float32)
    sum_b = tl.zeros([HEADS, PAIRS], dtype=tl.float32)
    for row in range(group, rows, tl.num_programs(0)):
        token, sample = row // batch, row % batch
        source = x + token * token_stride + sample * sample_stride + head[:, None] * head_stride + first[None, :]
        a = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(source + half[None, :], mask=valid, other=0.0).to(tl.float32)
        above = grad + token * grad_token_stride + sample * grad_sample_stride
        above += head[:, None] * grad_head_stride + first[None, :]
        grad_a = tl.load(above, mask=valid, other=0.0).to(tl.float32)
        grad_b = tl.load(above + half[None, :], mask=valid, other=0.0).to(tl.float32)
        if ROTATE:
            table = token * table_stride + first
            cos_a, cos_b = _two(cos + table, half, paired)
            sin_a, sin_b = _two(sin + table, half, paired)
            turned_back = grad_a * cos_a + grad_b * sin_b
            grad_b = grad_b * cos_b + grad_a * sin_a
            grad_a = turned_back
        inverse = _inverse_rms(a, b, eps, CHANNELS)
        a *= inverse
        b *= inverse
        sum_a += grad_a * a
        sum_b += grad_b * b
        grad_a *= weight_a
        grad_b *= weight_b
        along = tl.sum(grad_a * a + grad_b * b, 1)[:, None] / CHANNELS
        target = grad_x + (row * heads + head[:, None]) * CHANNELS + first[None, :]
        tl.store(target, (inverse * (grad_a - a * along)).to(grad_x.dtype.element_ty), mask=valid)
        tl.store(target + half[None, :], (inverse * (grad_b - b * along)).to(grad_x.dtype.element_ty), mask=valid)
    place = sums + (group * tl.num_programs(1) + block) * CHANNELS + first
    tl.store(place, tl.sum(sum_a, 0), mask=paired)
    tl.store(place + half, tl.sum(sum_b, 0), mask=paired)


@triton.jit
def _pairs(
    FRAME: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, RUN: tl.constexpr, PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of every pair: its first channel, the distance to its second, and whether it exists."""
    pair = tl.arange(0, PAIRS)
    in_frame, in_row = pair < FRAME // 2, pair < (FRAME + ROW) // 2
    half = tl.where(in_frame, FRAME // 2, tl.where(in_row, ROW // 2, COLUMN // 2))
    # Pair p of an axis that starts at channel c is p - c / 2 channels into it.
    first = pair + tl.where(in_frame, 0, tl.where(in_row, FRAME // 2, (FRAME + ROW) // 2))
    # Runs of neighbouring channels are loaded at once, which the compiler cannot see by itself.
    first = tl.max_contiguous(tl.multiple_of(first, RUN), RUN)
    half = tl.max_constancy(tl.multiple_of(half, RUN), RUN)
    return first, half, pair < CHANNELS // 2


@triton.jit
def _inverse_rms(a: tl.tensor, b: tl.tensor, eps: tl.tensor, CHANNELS: tl.constexpr) -> tl.tensor:
    return (1.0 / tl.sqrt(tl.sum(a * a + b * b, 1) / CHANNELS + eps))[:, None]


@triton.jit
def _weighted(normed: tl.tensor, weight: tl.tensor, paired: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    gain = tl.load(weight, mask=paired, other=0.0).to(tl.float32)
    return _rounded(_rounded(normed, dtype) * gain[None, :], dtype)


@triton.jit
def _two(table: tl.tensor, half: tl.tensor, paired: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    a = tl.load(table, mask=paired, other=0.0).to(tl.float32)
    b = tl.load(table + half, mask=paired, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@triton.jit
def _rounded(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return value.to(dtype).to(tl.float32)
