"""Gated residual `x + gate * branch`: one pass over the tokens each way, the gate's gradient summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_video.dit.kernels.launch import token_groups

_FORWARD_COLUMNS = 2048
_BACKWARD_COLUMNS, _BACKWARD_TOKENS = 512, 4
_PROGRAMS_PER_PROCESSOR = 8


class GatedResidual(torch.autograd.Function):
    """`x + gate * branch` with gate [1, b, D]; backward keeps the branch and the un-repeated gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """See `fused.gated_residual`."""
        x, branch = x.contiguous(), branch.contiguous()
        tokens, batch, width = x.shape
        out = torch.empty_like(x)
        grid = (tokens * batch, triton.cdiv(width, _FORWARD_COLUMNS))
        _forward[grid](x, gate, branch, out, batch, width, gate.stride(1), COLUMNS=_FORWARD_COLUMNS, num_warps=4)
        ctx.save_for_backward(gate, branch)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, gate, branch."""
        gate, branch = ctx.saved_tensors
        grad = grad.contiguous()
        tokens, batch, width = branch.shape
        blocks = triton.cdiv(width, _BACKWARD_COLUMNS)
        groups = token_groups(
            triton.cdiv(tokens, _BACKWARD_TOKENS), grad.device, _PROGRAMS_PER_PROCESSOR, blocks * batch
        )
        grad_branch = torch.empty_like(branch)
        sums = torch.empty(groups, batch, width, dtype=torch.float32, device=grad.device)
        _backward[(groups, batch, blocks)](
            grad, gate, branch, grad_branch, sums, tokens, batch, width, gate.stride(1),
            COLUMNS=_BACKWARD_COLUMNS, TOKENS=_BACKWARD_TOKENS, num_warps=4,
        )  # fmt: skip
        return grad, sums.sum(0, keepdim=True).to(gate.dtype), grad_branch


@triton.jit
def _forward(
    x: tl.tensor, gate: tl.tensor, branch: tl.tensor, out: tl.tensor, batch: tl.tensor, width: tl.tensor,
    gate_stride: tl.tensor, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    factor = tl.load(gate + row % batch * gate_stride + columns, mask=inside).to(tl.float32)
    place = row * width + columns
    added = factor * tl.load(branch + place, mask=inside).to(tl.float32)
    result = tl.load(x + place, mask=inside).to(tl.float32) + added
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad: tl.tensor, gate: tl.tensor, branch: tl.tensor, grad_branch: tl.tensor, sums: tl.tensor, tokens: tl.tensor,
    batch: tl.tensor, width: tl.tensor, gate_stride: tl.tensor, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    group, sample = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    factor = tl.load(gate + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for start in range(group * TOKENS, tokens, tl.num_programs(0) * TOKENS):
        token = start + tl.arange(0, TOKENS)
        place = (token.to(tl.int64) * batch + sample)[:, None] * width + columns[None, :]
        valid = (token < tokens)[:, None] & inside[None, :]
        incoming = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32)
        total += incoming * tl.load(branch + place, mask=valid, other=0.0).to(tl.float32)
        result = incoming * factor[None, :]
        tl.store(grad_branch + place, result.to(grad_branch.dtype.element_ty), mask=valid)
    row = (group * batch + sample).to(tl.int64)
    tl.store(sums + row * width + columns, tl.sum(total, 0), mask=inside)
