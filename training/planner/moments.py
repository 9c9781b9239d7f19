"""When memory is fullest: what a stage holds at the moments of a backward pass, beside state and kept activations.

Backward gives activations up as it goes, and needs gradients and what it computes again. Which moment is the fullest
depends on the layout, so all that can be are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from training.planner.activations import (
    attention_bytes,
    checkpoint_bytes,
    head_bytes,
    kept_bytes,
    recomputed_branches,
    residual_cut,
)
from training.planner.job import Job
from training.planner.work import BYTES, Branch, MicroBatch

FP32 = 4
# Megatron-FSDP's queues, in numbers: it gathers layers ahead, and lets gradients wait for their reduction, until they
# have as many (megatron_fsdp.py, suggested_communication_unit_size; what it calls a cap is the least).
_GATHERED_AHEAD, _WAITING_GRADIENTS = 500_000_000, 1_000_000_000
# Widths D in the head, beside its input and that input normalised: the gradient of its output, and what `addcmul` makes
# of it in plain torch, which the head is on every device.
_HEAD_INPUTS, _HEAD_GRADIENTS = 2, 4


@dataclass(frozen=True)
class Sizes:
    """Bytes of one micro-batch on one rank."""

    residual: float
    """Tokens of the residual stream."""
    whole: float
    """The same of all tensor-parallel ranks."""
    heads: float
    """A tensor of this rank's heads."""
    ffn: float
    """A tensor inside of the feed-forward."""
    kept: float
    """What a block keeps."""
    checkpoint: float
    """What a block keeps that is computed again."""
    head: float
    """What the output head keeps; 0 but on the last stage."""


def sizes_of(job: Job, batch: MicroBatch, stage: int) -> Sizes:
    """Of a stage's micro-batch."""
    shape, parallel, width = job.shape, job.parallel, BYTES[job.precision]
    tp = parallel.tensor_model_parallel_size
    tokens = width * batch.samples * batch.tokens / parallel.context_parallel_size
    last = stage == parallel.pipeline_model_parallel_size - 1
    return Sizes(
        residual=tokens * shape.hidden_size / residual_cut(parallel),
        whole=tokens * shape.hidden_size,
        heads=tokens * shape.hidden_size / tp,
        ffn=tokens * shape.ffn_size / tp,
        kept=kept_bytes(shape, batch, parallel, width, job.fused),
        checkpoint=checkpoint_bytes(shape, batch, parallel, width),
        head=head_bytes(shape, batch, parallel, width) if last else 0.0,
    )


def fullest(job: Job, batch: MicroBatch, stage: int) -> float:
    """Most bytes at one moment of the first backward pass, beside state and all activations under way."""
    sizes = sizes_of(job, batch, stage)
    moments = [moment - sizes.head for moment in _in_blocks(job, batch, sizes)]
    if sizes.head:
        moments.append((_HEAD_INPUTS + _HEAD_GRADIENTS) * sizes.residual - sizes.head)
    return max(moments) + _gathered(job, stage)


def _in_blocks(job: Job, batch: MicroBatch, sizes: Sizes) -> Iterator[float]:
    """At the blocks of a chunk where it may be fullest: what there is more than before backward came to the chunk."""
    layers = max(1, round(job.shape.num_layers / (job.parallel.pipeline_model_parallel_size * job.chunks)))
    recomputed = round(layers * job.share_recomputed)
    # From the last block to the first, what is held changes by the same for all of one kind.
    for block in {layers - 1, recomputed, recomputed - 1, 0} & set(range(layers)):
        behind = layers - 1 - block
        kept_behind = max(0, layers - max(recomputed, block + 1))
        given_up = kept_behind * sizes.kept + (behind - kept_behind) * sizes.checkpoint
        again = block < recomputed
        # A block that was computed again has its output, too.
        own = sizes.residual - sizes.checkpoint if again else -sizes.kept
        for moment in (_in_feed_forward(job, batch, sizes), _in_attention(job, batch, sizes)):
            yield own + moment - given_up + _waiting_gradients(job, behind + 1)


def _in_feed_forward(job: Job, batch: MicroBatch, sizes: Sizes) -> float:
    """All of a block when its second matrix is at its gradients: those of the residual stream, of the feed-forward's
    output on all tensor-parallel ranks, of its input, and of the matrix."""
    held = _held(job, batch, "mlp")
    # The output is given up by now, but for that of a second time.
    if "mlp" not in recomputed_branches(job.parallel):
        held -= sizes.residual
    return held + sizes.residual + sizes.whole + sizes.ffn + _weight_gradient(job)


def _in_attention(job: Job, batch: MicroBatch, sizes: Sizes) -> float:
    """All of a block when self-attention is at its gradients: those of its output, of query, key and value, and these
    again for the exchange."""
    ranks, parallel = job.parallel.context_parallel_size, job.parallel
    gradients = 4.0
    if ranks > 1 and parallel.cp_comm_type == "all_gather":
        gradients = 2 + 2 * 2 * ranks
    elif ranks > 1:
        gradients = 4 + 3
    held = attention_bytes(job.shape, batch, parallel, BYTES[job.precision], job.fused)
    return held + sizes.residual + gradients * sizes.heads


def _held(job: Job, batch: MicroBatch, again: Branch) -> float:
    return kept_bytes(job.shape, batch, job.parallel, BYTES[job.precision], job.fused, again)


def _weight_gradient(job: Job) -> float:
    """Of one matrix in its own type, before it is added to the buffer; Transformer Engine adds it there at once."""
    if job.parallel.transformer_impl == "transformer_engine":
        return 0.0
    shape, tp = job.shape, job.parallel.tensor_model_parallel_size
    return BYTES[job.precision] * shape.hidden_size * shape.ffn_size / tp


def _waiting_gradients(job: Job, blocks: int) -> float:
    """Of `blocks` that backward has been through, under Megatron-FSDP: whole, until they are reduced."""
    parallel = job.parallel
    if not parallel.use_megatron_fsdp or parallel.data_parallel_sharding_strategy == "optim":
        return 0.0
    layer = job.shape.layer_parameters.of_rank(parallel.tensor_model_parallel_size)
    return FP32 * layer * min(blocks, 1 + _WAITING_GRADIENTS // layer)


def _gathered(job: Job, stage: int) -> float:
    """Weights that Megatron-FSDP has gathered: of one block and those ahead, and of everything that is no block."""
    parallel = job.parallel
    if not parallel.use_megatron_fsdp or parallel.data_parallel_sharding_strategy != "optim_grads_params":
        return 0.0
    blocks = job.shape.num_layers / parallel.pipeline_model_parallel_size
    layer = job.shape.layer_parameters.of_rank(parallel.tensor_model_parallel_size)
    others = job.parameters_of(stage) - blocks * layer
    return BYTES[job.precision] * (layer * min(blocks, 1 + math.ceil(_GATHERED_AHEAD / layer)) + others)
