"""What a block keeps for its backward pass, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_video.parallel import ParallelConfig
from training.planner.shape import ModelShape
from training.planner.work import BYTES, Branch, MicroBatch

FP32 = 4


@dataclass(frozen=True)
class Kept:
    """Tensors of one kind, in numbers a token."""

    what: str
    """In words."""
    branch: Branch | None
    """Recomputing this branch spares it; None: it is what recomputation starts from, or behind it."""
    residual: float = 0.0
    """Widths D, as in the residual stream: cut over tensor-parallel ranks under sequence parallelism alone."""
    heads: float = 0.0
    """Widths D that tensor-parallel ranks share."""
    ffn: float = 0.0
    """Widths of the feed-forward, which they share too."""
    statistics: float = 0.0
    """fp32 numbers, cut as the residual stream is."""
    head_statistics: float = 0.0
    """fp32 numbers of every head."""
    plain_only: bool = False
    """Spared by the fused kernels (dit/fused.py)."""
    raised: float = 0.0
    """Widths D that tensor-parallel ranks share, which plain torch raises to fp32 where they are not, and keeps."""
    raised_alone: bool = False
    """Whether they are kept in fp32 only, and not beside `heads`."""


_PROJECTED = Kept("query, key and value", "projections", heads=3)
# tests/unit/test_saved_activations.py counts them where autograd keeps them.
VIDEO_TOKEN = (
    Kept("input of norm 1", None, residual=1),
    Kept("norm 1: normalised", "projections", residual=1, plain_only=True),
    Kept("norm 1: modulated; mean and deviation", "projections", residual=1, statistics=2),
    _PROJECTED,
    Kept("query and key, as plain torch norms them", "core_attn", raised=2),
    Kept("query and key normalised", "core_attn", heads=2, plain_only=True),
    Kept("query and key rotated; deviations, log-sum of attention", "core_attn", heads=2, head_statistics=3),
    Kept("attention output", "projections", heads=1),
    Kept("its projection, for the gate", "projections", residual=1),
    Kept("input of cross-attention", None, residual=1),
    Kept("cross-attention: query", "cross_attention", heads=1, raised=1, raised_alone=True),
    Kept("cross-attention: query normalised", "cross_attention", heads=1, plain_only=True),
    Kept("cross-attention: query weighted; deviation, log-sum", "cross_attention", heads=1, head_statistics=2),
    Kept("cross-attention: output", "cross_attention", heads=1),
    Kept("input of norm 2", None, residual=1),
    Kept("norm 2: normalised", "mlp", residual=1, plain_only=True),
    Kept("norm 2: modulated; mean and deviation", "mlp", residual=1, statistics=2),
    Kept("feed-forward before and after GELU", "mlp", ffn=2),
    Kept("feed-forward output, for the gate", None, residual=1),
)
TEXT_TOKEN = (
    Kept("text key and value", "cross_attention", heads=2, raised=1),
    Kept("text key normalised", "cross_attention", heads=1, plain_only=True),
    Kept("text key weighted; deviation", "cross_attention", heads=1, head_statistics=1),
)
# Beside these, where context-parallel ranks exchange: what attention is given and gives is another tensor than the
# projections' own.
_EXCHANGED = (
    Kept("value after the all-to-all", "core_attn", heads=1),
    Kept("attention output before the all-to-all back", "core_attn", heads=1),
)
# Widths a sample: six modulations, and 1 + scale of two.
_MODULATION = 8
# Widths a token in the output head: its input, normalised, modulated.
_HEAD = 3


def kept_bytes(
    shape: ModelShape,
    batch: MicroBatch,
    parallel: ParallelConfig,
    width: int = BYTES["bf16"],
    fused: bool = True,
    again: Branch | None = None,
) -> float:
    """Bytes that one rank keeps of one block for one micro-batch, with the selective recomputation of `parallel`.

    Full recomputation keeps `checkpoint_bytes` instead.

    Args:
        shape: of the model.
        batch: its samples.
        parallel: what is cut and what is recomputed.
        width: bytes of a number.
        fused: whether the fused kernels run (CUDA) or plain torch.
        again: a branch that has just been computed again, and is there.
    """
    spared = recomputed_branches(parallel) - {again}
    rows = [row for row in _rows(parallel) if row.branch not in spared]
    texts = [row for row in TEXT_TOKEN if row.branch not in spared]
    modulation = _MODULATION * shape.hidden_size * batch.samples * width
    return modulation + _sum(rows, texts, shape, batch, parallel, width, fused)


def attention_bytes(
    shape: ModelShape, batch: MicroBatch, parallel: ParallelConfig, width: int = BYTES["bf16"], fused: bool = True
) -> float:
    """Bytes that one rank still holds of a block when backward comes to its self-attention: all that is kept up to it,
    what had to be computed again included."""
    end = next(place for place, row in enumerate(VIDEO_TOKEN) if row.what == "attention output") + 1
    return _sum([*VIDEO_TOKEN[:end], *_exchanged(parallel)], [], shape, batch, parallel, width, fused)


def recomputed_branches(parallel: ParallelConfig) -> frozenset[str]:
    """Branches that selective recomputation computes again."""
    selective = parallel.recompute_granularity == "selective"
    return frozenset(parallel.recompute_modules if selective else ())


def checkpoint_bytes(
    shape: ModelShape, batch: MicroBatch, parallel: ParallelConfig, width: int = BYTES["bf16"]
) -> float:
    """Bytes that one rank keeps of one block that is computed again: its input."""
    tokens = batch.samples * batch.tokens / parallel.context_parallel_size
    return width * tokens * shape.hidden_size / residual_cut(parallel)


def patch_bytes(shape: ModelShape, batch: MicroBatch, width: int = BYTES["bf16"]) -> float:
    """Bytes that the first stage keeps of the patches, before they are embedded."""
    return width * batch.samples * batch.tokens * shape.in_channels


def head_bytes(shape: ModelShape, batch: MicroBatch, parallel: ParallelConfig, width: int = BYTES["bf16"]) -> float:
    """Bytes that the last stage keeps for the output head, and the prediction's error in fp32."""
    tokens = batch.samples * batch.tokens
    own = tokens / (parallel.context_parallel_size * residual_cut(parallel))
    return width * _HEAD * own * shape.hidden_size + FP32 * tokens * shape.out_channels


def text_bytes(shape: ModelShape, batch: MicroBatch, width: int = BYTES["bf16"]) -> float:
    """Bytes of the projected text, which the blocks of a chunk share, and of what its projection keeps."""
    widths = 4 * shape.hidden_size + shape.llm_channels + (shape.clip_channels or 0)
    return width * batch.samples * batch.text_tokens * widths


def rotary_bytes(shape: ModelShape, batch: MicroBatch, width: int = BYTES["bf16"]) -> float:
    """Bytes of the two rotary tables for one size of samples."""
    return 2 * width * batch.tokens * shape.head_dim


def _exchanged(parallel: ParallelConfig) -> tuple[Kept, ...]:
    ranks = parallel.context_parallel_size
    if ranks == 1 or parallel.cp_comm_type == "p2p":  # a ring keeps this rank's keys and values only
        return ()
    if parallel.cp_comm_type == "all_gather":
        return (Kept("keys and values of all ranks, for this rank's keys", "core_attn", heads=2 * ranks - 1),)
    return _EXCHANGED


def _rows(parallel: ParallelConfig) -> tuple[Kept, ...]:
    return (*VIDEO_TOKEN, *_exchanged(parallel))


def _sum(
    rows: Iterable[Kept],
    text_rows: Iterable[Kept],
    shape: ModelShape,
    batch: MicroBatch,
    parallel: ParallelConfig,
    width: int,
    fused: bool,
) -> float:
    tokens = batch.samples * batch.tokens / parallel.context_parallel_size
    texts = batch.samples * batch.text_tokens
    return sum(
        count * _row_bytes(row, shape, parallel, width, fused)
        for count, table in ((tokens, rows), (texts, text_rows))
        for row in table
        if not (fused and row.plain_only) and not (row is _PROJECTED and _copied(parallel, width, fused))
    )


def _copied(parallel: ParallelConfig, width: int, fused: bool) -> bool:
    """Whether nobody needs the projections themselves: query and key are raised, and all three exchanged."""
    again = "core_attn" in recomputed_branches(parallel)
    return _raises(width, fused) and not again and bool(_exchanged(parallel))


def _raises(width: int, fused: bool) -> bool:
    return not fused and width != FP32


def _row_bytes(row: Kept, shape: ModelShape, parallel: ParallelConfig, width: int, fused: bool) -> float:
    """Bytes a token on one rank."""
    tp, d, cut = parallel.tensor_model_parallel_size, shape.hidden_size, residual_cut(parallel)
    raised = row.raised if _raises(width, fused) else 0.0
    heads = row.heads - (raised if row.raised_alone else 0.0)
    numbers = row.residual * d / cut + (heads * d + row.ffn * shape.ffn_size) / tp
    in_fp32 = raised * d / tp + row.statistics / cut + row.head_statistics * shape.num_heads / tp
    return width * numbers + FP32 * in_fp32


def residual_cut(parallel: ParallelConfig) -> int:
    """Ranks that share the residual stream, beside context parallelism."""
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
