"""What the paper says of memory and traffic (arXiv 2502.10248, 6.2.2), beside what the planner says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_video.dit.config import DiTConfig
from megatron_video.flops import latent_shape
from megatron_video.parallel import ParallelConfig
from training.planner.activations import kept_bytes
from training.planner.cluster import GIB, Cluster
from training.planner.job import Job
from training.planner.memory import peak_memory
from training.planner.shape import ModelShape
from training.planner.step_time import step_seconds
from training.planner.work import MicroBatch

# Samples a node (Table 6): 40 images, 4 clips.
_BELOW_10K = (("1x256x256", 40), ("68x192x320", 4), ("136x192x320", 4), ("204x192x320", 4))
_TP8 = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True, use_distributed_optimizer=True)


@dataclass(frozen=True)
class Claim:
    """One figure."""

    what: str
    """In words."""
    paper: str
    """As printed."""
    planner: float
    """In `unit`."""
    unit: str
    """Of the planner's figure."""


def claims(cluster: Cluster) -> list[Claim]:
    """All of them, on the paper's cluster."""
    return [activations_at_tp8(), *saved_by_pipeline(cluster), *data_parallel_shares(cluster)]


def activations_at_tp8() -> Claim:
    """Of all 48 blocks for one sample of 204 x 544 x 992, nothing recomputed."""
    shape = ModelShape.of(DiTConfig())
    sample = MicroBatch(1, latent_shape(204, 544, 992).tokens)
    activations = shape.num_layers * kept_bytes(shape, sample, _TP8)
    return Claim("activations of a 540P sample of 204 frames at TP8 + SP", "120 GB", activations / GIB, "GiB")


def saved_by_pipeline(cluster: Cluster) -> Iterator[Claim]:
    """Weights and fp32 gradients of a device beside those of TP8 alone."""
    alone = _weights_and_gradients(cluster, 1)
    yield Claim("weights and gradients at TP8, the most that PP can save", "~20 GB", alone / GIB, "GiB")
    for stages in (4, 16):
        saved = alone - _weights_and_gradients(cluster, stages)
        yield Claim(f"saved of them by PP{stages}", "~20 GB", saved / GIB, "GiB")


def data_parallel_shares(cluster: Cluster) -> Iterator[Claim]:
    """Of a step of below 10,000 tokens, gradients and weights exchanged before and after it."""
    for bucket, samples in _BELOW_10K:
        frames, height, width = map(int, bucket.split("x"))
        batch = MicroBatch(samples, latent_shape(frames, height, width).tokens)
        for overlap in (False, True):
            parallel = replace(_TP8, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
            step = {batch: cluster.gpus / cluster.gpus_per_node}
            seconds = step_seconds(Job(ModelShape.of(DiTConfig()), parallel, cluster, step))
            share = 100 * seconds.data_parallel / seconds.total
            how = "overlapped" if overlap else "not overlapped"
            paper = "not given" if overlap else "> 30 %"
            yield Claim(f"data-parallel share of a step, {samples} x {bucket} a node, {how}", paper, share, "%")


def _weights_and_gradients(cluster: Cluster, stages: int) -> float:
    parallel = replace(_TP8, pipeline_model_parallel_size=stages)
    # What runs does not matter to them.
    memory = peak_memory(Job(ModelShape.of(DiTConfig()), parallel, cluster, {MicroBatch(1, 1): 1.0}))
    return max(stage.weights + stage.gradients for stage in memory)
