"""How much memory of a device a training step takes, by part, on every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from training.planner.activations import patch_bytes, rotary_bytes, text_bytes
from training.planner.cluster import GIB
from training.planner.job import Job
from training.planner.moments import fullest, sizes_of
from training.planner.work import BYTES, MicroBatch

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a step."""

    weights: float
    """That the model computes with."""
    gradients: float
    """Summed in fp32."""
    optimizer: float
    """fp32 weights and two moments."""
    ema: float
    """Averaged weights."""
    activations: float
    """Kept for backward, of all micro-batches under way."""
    workspace: float
    """What the backward pass of one block holds beside: its recomputed activations, gathered tokens, gradients."""
    communication: float
    """Buffers of context-parallel exchange and of messages between stages."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(vars(self).values())

    @property
    def model_state(self) -> float:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer + self.ema

    def by_part(self) -> dict[str, float]:
        """Every part under its name, in bytes."""
        return dict(vars(self))

    def in_gib(self) -> dict[str, float]:
        """The same in GiB."""
        return {name: value / GIB for name, value in self.by_part().items()}


def peak_memory(job: Job) -> list[Memory]:
    """Of every pipeline stage, with the micro-batch that takes most."""
    stages = job.parallel.pipeline_model_parallel_size
    return [max((_stage_memory(job, batch, stage) for batch in job.step), key=lambda memory: memory.total)
            for stage in range(stages)]  # fmt: skip


def layers_under_way(job: Job, stage: int) -> float:
    """Blocks of one rank whose activations are there at once, counted once for every micro-batch.

    Plain 1F1B: stage r of p starts p - r micro-batches before its first backward. Interleaved: chunks of
    2 (p - r - 1) + (chunks - 1) p + 1 (megatron-core's warm-up and the one behind it).
    """
    stages = job.parallel.pipeline_model_parallel_size
    return chunks_under_way(job, stage) * job.shape.num_layers / (stages * job.chunks)


def chunks_under_way(job: Job, stage: int) -> float:
    """Chunks of one rank whose activations are there at once (`layers_under_way`)."""
    stages, chunks = job.parallel.pipeline_model_parallel_size, job.chunks
    # A step of fewer micro-batches never has more under way.
    most = max(1.0, job.micro_batches)
    if chunks == 1:
        return min(most, stages - stage)
    return min(most * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def _stage_memory(job: Job, batch: MicroBatch, stage: int) -> Memory:
    width = BYTES[job.precision]
    parameters = job.parameters_of(stage)
    weights, gradients = _sharded(job)
    return Memory(
        weights=parameters * width / weights,
        gradients=parameters * FP32 / gradients,
        optimizer=parameters * _optimizer_bytes(job) / job.optimizer_shards,
        ema=parameters * FP32 / job.optimizer_shards if job.ema else 0.0,
        activations=_activations(job, batch, stage),
        workspace=fullest(job, batch, stage) + _inputs(job, batch),
        communication=_communication(job, batch, stage),
    )


def _optimizer_bytes(job: Job) -> int:
    """Of one parameter: fp32 weights where they are not those that the model computes with, and two moments."""
    own_weights = job.precision == "bf16" or job.parallel.use_megatron_fsdp
    return (0 if job.optimizer_on_host else 2 * FP32) + (FP32 if own_weights else 0)


def _activations(job: Job, batch: MicroBatch, stage: int) -> float:
    """Kept for backward by all chunks under way."""
    shape, width = job.shape, BYTES[job.precision]
    sizes, share = sizes_of(job, batch, stage), job.share_recomputed
    kept = layers_under_way(job, stage) * (share * sizes.checkpoint + (1 - share) * sizes.kept)
    chunks = chunks_under_way(job, stage)
    kept += chunks * text_bytes(shape, batch, width)
    if stage == 0:
        # Every chunk behind the first has as many micro-batches under way as there are stages.
        firsts = chunks - (job.chunks - 1) * job.parallel.pipeline_model_parallel_size
        kept += max(1.0, firsts) * patch_bytes(shape, batch, width)
    return kept + sizes.head


def _inputs(job: Job, batch: MicroBatch) -> float:
    """Rotary tables of all sizes, which stay, and on a GPU latents and target of the micro-batch."""
    tables = sum(rotary_bytes(job.shape, kind, BYTES[job.precision]) for kind in job.step)
    ranks = job.parallel.context_parallel_size
    # A rank's part of them is a copy.
    tables *= 1 + (1 / ranks if ranks > 1 else 0)
    latents = 2 * FP32 * batch.samples * batch.tokens * job.shape.in_channels if job.fused else 0.0
    return tables + latents


def _sharded(job: Job) -> tuple[float, float]:
    """Ranks that share weights, and gradients."""
    if not job.parallel.use_megatron_fsdp:
        return 1.0, 1.0
    strategy = job.parallel.data_parallel_sharding_strategy
    weights = job.optimizer_shards if strategy == "optim_grads_params" else 1.0
    return weights, 1.0 if strategy == "optim" else job.optimizer_shards


def _communication(job: Job, batch: MicroBatch, stage: int) -> float:
    sizes, parallel = sizes_of(job, batch, stage), job.parallel
    messages = 0.0
    if parallel.pipeline_model_parallel_size > 1:
        messages = chunks_under_way(job, stage)
        # What a chunk sent on stays until its gradient comes; the gradient that was sent back last stays too, and
        # interleaved stages have received one message each way ahead.
        if job.chunks > 1:
            messages += 3
        elif stage == parallel.pipeline_model_parallel_size - 1:
            messages = 1
        elif stage > 0:
            messages += 1
    # megatron-core's own linears gather tokens into a buffer that stays.
    keeps_buffer = parallel.sequence_parallel and parallel.transformer_impl == "local"
    return messages * sizes.residual + (sizes.whole if keeps_buffer else 0.0)
