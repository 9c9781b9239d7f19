"""LayerNorm and adaLN modulation in one pass over the tokens, forward and backward.

Backward keeps the input, two numbers a token, and the modulation as [1, b, D]; the normalised tokens are computed again
from them. Over the tokens it needs two sums only, sum(g) and sum(g * normalised): the gradients of shift, scale, weight
and bias all follow from these.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_video.dit.kernels.launch import token_groups

# A program holds a whole token and two rows of sums, which at the width of the 30B takes all of a multiprocessor's
# registers: while it adds up one token, it fetches the next.
_PROGRAMS_PER_PROCESSOR = 1
_FINISH_COLUMNS, _FINISH_GROUPS = 64, 32


class ModulatedLayerNorm(torch.autograd.Function):
    """`shift + (1 + scale) * LayerNorm(x)`, rounded where the plain code rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """See `fused.modulated_layer_norm`."""
        x = x.contiguous()
        tokens, batch, width = x.shape
        out = torch.empty_like(x)
        statistics = torch.empty(2, tokens, batch, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        _forward[(tokens * batch,)](
            x, weight, bias, shift, scale, out, *statistics, batch, width, shift.stride(1), scale.stride(1), eps,
            BLOCK=block, num_warps=_warps(block, 1024),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, scale, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, shift, scale."""
        x, weight, bias, scale, statistics = ctx.saved_tensors
        grad = grad.contiguous()
        tokens, batch, width = x.shape
        grad_x = torch.empty_like(x)
        groups = token_groups(tokens, x.device, _PROGRAMS_PER_PROCESSOR, batch)
        sums = torch.empty(2, groups, batch, width, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        _backward[(groups, batch)](
            grad, x, weight, scale, *statistics, grad_x, *sums, tokens, batch, width, scale.stride(1),
            BLOCK=block, num_warps=_warps(block, 512),
        )  # fmt: skip
        grad_shift, grad_scale = torch.empty(2, 1, batch, width, dtype=scale.dtype, device=x.device)
        grad_weight, grad_bias = torch.empty(2, width, dtype=weight.dtype, device=x.device)
        _finish[(triton.cdiv(width, _FINISH_COLUMNS),)](
            *sums, weight, bias, scale, grad_weight, grad_bias, grad_shift, grad_scale,
            groups, batch, width, scale.stride(1), COLUMNS=_FINISH_COLUMNS, GROUPS=_FINISH_GROUPS, num_warps=4,
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_shift, grad_scale, None


def _warps(block: int, elements_per_warp: int) -> int:
    return max(1, min(16, block // elements_per_warp))


@triton.jit
def _forward(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, shift: tl.tensor, scale: tl.tensor, out: tl.tensor,
    mean: tl.tensor, rstd: tl.tensor, batch: tl.tensor, width: tl.tensor, shift_stride: tl.tensor,
    scale_stride: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(values, 0) / width
    centred = tl.where(inside, values - average, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(mean + row, average)
    tl.store(rstd + row, inverse)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    # The plain code rounds after LayerNorm and after 1 + scale.
    normed = (centred * inverse * gain + offset).to(out.dtype.element_ty).to(tl.float32)
    factor = _factor(scale + sample * scale_stride, columns, inside)
    added = tl.load(shift + sample * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (added + normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad: tl.tensor, x: tl.tensor, weight: tl.tensor, scale: tl.tensor, mean: tl.tensor, rstd: tl.tensor,
    grad_x: tl.tensor, grad_sums: tl.tensor, product_sums: tl.tensor, tokens: tl.tensor, batch: tl.tensor,
    width: tl.tensor, scale_stride: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    group, sample = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    gain *= _factor(scale + sample * scale_stride, columns, inside)
    grad_sum = tl.zeros([BLOCK], dtype=tl.float32)
    product_sum = tl.zeros([BLOCK], dtype=tl.float32)
    step = tl.num_programs(0)
    place = (group * batch + sample) * width + columns
    next_grad = tl.load(grad + place, mask=inside, other=0.0)
    next_x = tl.load(x + place, mask=inside, other=0.0)
    for token in range(group, tokens, step):
        row = token * batch + sample
        incoming, values = next_grad.to(tl.float32), next_x.to(tl.float32)
        place = (row + step * batch) * width + columns
        next_grad = tl.load(grad + place, mask=inside & (token + step < tokens), other=0.0)
        next_x = tl.load(x + place, mask=inside & (token + step < tokens), other=0.0)
        inverse = tl.load(rstd + row)
        normed = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        weighted = incoming * gain
        along_mean = tl.sum(weighted, 0) / width
        along_normed = tl.sum(weighted * normed, 0) / width
        result = inverse * (weighted - along_mean - normed * along_normed)
        tl.store(grad_x + row * width + columns, result.to(grad_x.dtype.element_ty), mask=inside)
        grad_sum += incoming
        product_sum += incoming * normed
    place = (group * batch + sample) * width + columns
    tl.store(grad_sums + place, grad_sum, mask=inside)
    tl.store(product_sums + place, product_sum, mask=inside)


@triton.jit
def _finish(
    grad_sums: tl.tensor, product_sums: tl.tensor, weight: tl.tensor, bias: tl.tensor, scale: tl.tensor,
    grad_weight: tl.tensor, grad_bias: tl.tensor, grad_shift: tl.tensor, grad_scale: tl.tensor,
    groups: tl.tensor, batch: tl.tensor, width: tl.tensor, scale_stride: tl.tensor,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    weight_total = tl.zeros([COLUMNS], dtype=tl.float32)
    bias_total = tl.zeros([COLUMNS], dtype=tl.float32)
    for sample in range(batch):
        grad_total = _total(grad_sums, columns, inside, sample, groups, batch, width, COLUMNS, GROUPS)
        product_total = _total(product_sums, columns, inside, sample, groups, batch, width, COLUMNS, GROUPS)
        factor = _factor(scale + sample * scale_stride, columns, inside)
        weight_total += factor * product_total
        bias_total += factor * grad_total
        place = sample * width + columns
        of_scale = gain * product_total + offset * grad_total
        tl.store(grad_shift + place, grad_total.to(grad_shift.dtype.element_ty), mask=inside)
        tl.store(grad_scale + place, of_scale.to(grad_scale.dtype.element_ty), mask=inside)
    tl.store(grad_weight + columns, weight_total.to(grad_weight.dtype.element_ty), mask=inside)
    tl.store(grad_bias + columns, bias_total.to(grad_bias.dtype.element_ty), mask=inside)


@triton.jit
def _total(
    sums: tl.tensor, columns: tl.tensor, inside: tl.tensor, sample: tl.tensor, groups: tl.tensor, batch: tl.tensor,
    width: tl.tensor, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    total = tl.zeros([GROUPS, COLUMNS], dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        rows = (group * batch + sample).to(tl.int64) * width
        valid = (group < groups)[:, None] & inside[None, :]
        total += tl.load(sums + rows[:, None] + columns[None, :], mask=valid, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _factor(scale_row: tl.tensor, columns: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """1 + scale, rounded to the modulation's dtype as the plain code does."""
    scale = tl.load(scale_row + columns, mask=inside, other=0.0).to(tl.float32)
    return (scale + 1.0).to(scale_row.dtype.element_ty).to(tl.float32)
