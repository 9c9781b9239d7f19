"""Bytes of what lies on storage: encoded samples and checkpoints."""

from __future__ import annotations

from megatron_video.text.clip import DEFAULT_MAX_LENGTH as CLIP_TOKENS
from training.planner.job import Job
from training.planner.shape import ModelShape
from training.planner.work import BYTES, MicroBatch

_BF16, _FP32 = BYTES["bf16"], BYTES["fp32"]
# Mean and log-variance.
_MOMENTS = 2


def latent_bytes(shape: ModelShape, batch: MicroBatch) -> float:
    """Of a micro-batch's moments in a shard."""
    return _BF16 * _MOMENTS * batch.samples * batch.tokens * shape.in_channels


def text_bytes(shape: ModelShape, batch: MicroBatch) -> float:
    """Of a micro-batch's text states in a shard: those of CLIP fill all slots, the language model's are as many as the
    caption has."""
    if shape.clip_channels is None:
        return _BF16 * batch.samples * batch.text_tokens * shape.llm_channels
    words = llm_tokens(shape, batch)
    return _BF16 * batch.samples * (words * shape.llm_channels + CLIP_TOKENS * shape.clip_channels)


def llm_tokens(shape: ModelShape, batch: MicroBatch) -> int:
    """Of a micro-batch's text tokens, those that are the language model's."""
    return max(1, batch.text_tokens - CLIP_TOKENS) if shape.clip_channels is not None else batch.text_tokens


def sample_bytes(shape: ModelShape, batch: MicroBatch) -> float:
    """Of a micro-batch in a shard, without the few bytes of metadata."""
    return latent_bytes(shape, batch) + text_bytes(shape, batch)


def checkpoint_bytes(job: Job) -> float:
    """Of a checkpoint: the weights, fp32 weights and two moments of the optimizer, and averages."""
    return job.shape.parameters.total * (BYTES[job.precision] + 3 * _FP32 + (_FP32 if job.ema else 0))


def read_seconds(job: Job) -> float:
    """To read one step's samples; every node of a replica reads all of them."""
    cluster, size = job.cluster, job.parallel.model_parallel_size
    nodes_of_replica = max(1.0, size / cluster.gpus_per_node)
    read = sum(sample_bytes(job.shape, batch) * count for batch, count in job.step.items()) * nodes_of_replica
    return read / cluster.storage.read_bytes_per_second(cluster.nodes)
