"""What one block has to do for one micro-batch, on one rank: products, attention, bytes to move, messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_video.flops import TABLE_3_TEXT_TOKENS
from megatron_video.parallel import ParallelConfig
from training.planner.shape import ModelShape

Branch = Literal["projections", "core_attn", "cross_attention", "mlp"]
"""Parts of a block; all but the first can be recomputed alone (ParallelConfig.recompute_modules)."""

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one size that run through the model together."""

    samples: int
    """How many."""
    tokens: int
    """Video tokens of each."""
    text_tokens: int = TABLE_3_TEXT_TOKENS
    """Text tokens of each."""


@dataclass(frozen=True)
class Work:
    """Of one pass through a branch, on one rank."""

    gemm_flops: float = 0.0
    """Matrix products."""
    attention_flops: float = 0.0
    """Scores and values."""
    moved_bytes: float = 0.0
    """Read from and written to the device's memory by everything else."""
    gathered_bytes: float = 0.0
    """Sum of the sizes, before they are cut, of tensors that tensor-parallel ranks gather or reduce."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.gemm_flops + other.gemm_flops,
            self.attention_flops + other.attention_flops,
            self.moved_bytes + other.moved_bytes,
            self.gathered_bytes + other.gathered_bytes,
        )


# Tensors of a token's width D that are read and written, forward and backward, by the fused kernels (dit/fused.py):
#   norm with modulation: x -> y; x, g -> g            gated residual: x, branch -> x; g, branch -> g
#   sum of two gradients where a branch leaves the residual stream, backward only: g, g -> g
_PASSES: dict[Branch, tuple[int, int]] = {
    "projections": (2 + 3, 3 + 3 + 3),
    # Queries and keys, each normed and rotated.
    "core_attn": (4, 6),
    # Queries normed; a plain residual, whose gradient passes through.
    "cross_attention": (2 + 3, 3 + 3),
    "mlp": (2 + 3, 3 + 3 + 3),
}
# The same at the width of the feed-forward: x -> y; x, g -> g.
_FFN_PASSES = (2, 3)
# Sequence-parallel collectives of a branch: gathered before, reduced after. Backward does both the other way round,
# and gathers the input once more for the gradient of the first matrix, which kept its own part only.
_GATHERS: dict[Branch, tuple[int, int]] = {
    "projections": (2, 3),
    "core_attn": (0, 0),
    "cross_attention": (2, 3),
    "mlp": (2, 3),
}


# FLOPs of backward over those of forward. Attention computes its scores again, which were never kept: five products for
# two. MFU counts four of them.
_BACKWARD_GEMM, _BACKWARD_ATTENTION = 2.0, 2.5


def forward_work(shape: ModelShape, batch: MicroBatch, parallel: ParallelConfig, width: int = 2) -> dict[Branch, Work]:
    """Of the forward pass of one block on one rank, by branch.

    Args:
        shape: of the model.
        batch: what runs through it.
        parallel: its tensor- and context-parallel sizes share the work evenly.
        width: bytes of a number.
    """
    return {branch: _branch_work(branch, shape, batch, parallel, width, forward=True) for branch in _PASSES}


def backward_work(shape: ModelShape, batch: MicroBatch, parallel: ParallelConfig, width: int = 2) -> dict[Branch, Work]:
    """Of the backward pass; arguments as in `forward_work`."""
    return {branch: _branch_work(branch, shape, batch, parallel, width, forward=False) for branch in _PASSES}


def model_flops(shape: ModelShape, batch: MicroBatch) -> float:
    """FLOPs of forward and backward of a micro-batch, without recomputation: those that MFU counts.

    For our models the same as `megatron_video.flops.training_flops`.
    """
    works = forward_work(shape, batch, ParallelConfig()).values()
    return 3 * shape.num_layers * sum(work.gemm_flops + work.attention_flops for work in works)


def _branch_work(
    branch: Branch, shape: ModelShape, batch: MicroBatch, parallel: ParallelConfig, width: int, forward: bool
) -> Work:
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    gemm, attention = _flops(branch, shape, batch)
    which = 0 if forward else 1
    tokens = batch.samples * batch.tokens / cp
    # Norms and residuals are on every rank's own tokens, or on all of them without sequence parallelism.
    residual_share = tp if parallel.sequence_parallel or branch == "core_attn" else 1
    moved = _PASSES[branch][which] * tokens * shape.hidden_size * width / residual_share
    if branch == "mlp":
        moved += _FFN_PASSES[which] * tokens * shape.ffn_size * width / tp
    gathers = _GATHERS[branch][which] if parallel.sequence_parallel else _GATHERS[branch][0]
    return Work(
        gemm * (1.0 if forward else _BACKWARD_GEMM) / (tp * cp),
        attention * (1.0 if forward else _BACKWARD_ATTENTION) / (tp * cp),
        moved,
        gathers * tokens * shape.hidden_size * width if tp > 1 else 0.0,
    )


def _flops(branch: Branch, shape: ModelShape, batch: MicroBatch) -> tuple[float, float]:
    """(matrix products, attention) of forward, over all ranks."""
    d, n, s, t = shape.hidden_size, batch.samples, batch.tokens, batch.text_tokens
    if branch == "projections":
        return 8.0 * n * s * d * d, 0.0
    if branch == "core_attn":
        return 0.0, 4.0 * n * s * s * d
    if branch == "cross_attention":
        return 4.0 * n * s * d * d + 4.0 * n * t * d * d, 4.0 * n * s * t * d
    return 4.0 * n * s * d * shape.ffn_size, 0.0
