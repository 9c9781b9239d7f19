"""One training job as the planner sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_video.layout import Precision
from megatron_video.parallel import ParallelConfig
from training.planner.cluster import Cluster
from training.planner.shape import ModelShape
from training.planner.work import MicroBatch, model_flops


@dataclass(frozen=True)
class Job:
    """What is trained, how it is laid out, and on what."""

    shape: ModelShape
    """The model."""
    parallel: ParallelConfig
    """How it is cut."""
    cluster: Cluster
    """Where it runs."""
    step: Mapping[MicroBatch, float]
    """Micro-batches of one step over all replicas, by kind, with their number."""
    precision: Precision = "bf16"
    """Of weights and activations."""
    fp8_share: float = 0.0
    """Share of the blocks whose matrix products are FP8."""
    ema: bool = False
    """Whether averages of the weights are on the device."""
    optimizer_on_host: bool = False
    """Whether moments are in host memory and updated there."""

    fused: bool = True
    """Whether the fused kernels run (CUDA)."""
    recomputed: float | None = None
    """Share of the layers that are computed again, where it is no whole number of layers of every chunk; None: what
    `parallel` says."""

    @property
    def share_recomputed(self) -> float:
        """Share of the layers that full recomputation runs again; 0 without it."""
        parallel = self.parallel
        if parallel.recompute_granularity != "full":
            return 0.0
        if self.recomputed is not None:
            return self.recomputed
        if parallel.recompute_num_layers is None:
            return 1.0
        pieces = self.chunks * parallel.pipeline_model_parallel_size
        return min(1.0, parallel.recompute_num_layers * pieces / self.shape.num_layers)

    @property
    def replicas(self) -> float:
        """Data-parallel size."""
        return self.cluster.gpus / self.parallel.model_parallel_size

    @property
    def micro_batches(self) -> float:
        """Of one replica in one step, on average."""
        return sum(self.step.values()) / self.replicas

    @property
    def optimizer_shards(self) -> float:
        """Ranks that share the optimizer's state."""
        sharded = self.parallel.use_distributed_optimizer or self.parallel.use_megatron_fsdp
        return self.replicas * self.parallel.context_parallel_size if sharded else 1.0

    @property
    def stage_parameters(self) -> float:
        """Parameters of one rank, of the fullest stage."""
        return max(self.parameters_of(stage) for stage in (0, self.parallel.pipeline_model_parallel_size - 1))

    def parameters_of(self, stage: int) -> float:
        """Parameters of one rank of a stage."""
        stages, chunks = self.parallel.pipeline_model_parallel_size, self.chunks
        return self.shape.stage_parameters(stage, stages, chunks).of_rank(self.parallel.tensor_model_parallel_size)

    @property
    def chunks(self) -> int:
        """Pieces of a stage."""
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def flops(self) -> float:
        """Of the model in one step, forward and backward; recomputation does not count."""
        return sum(model_flops(self.shape, batch) * count for batch, count in self.step.items())

    @property
    def tokens(self) -> float:
        """Video tokens of one step."""
        return sum(batch.samples * batch.tokens * count for batch, count in self.step.items())

    @property
    def samples(self) -> float:
        """Of one step."""
        return sum(batch.samples * count for batch, count in self.step.items())

    def tflops_per_gpu(self, seconds: float) -> float:
        """Model TFLOP/s of one device, if a step takes so long."""
        return self.flops / (seconds * self.cluster.gpus * 1e12)

    def mfu(self, seconds: float) -> float:
        """Share of the peak of the weights' type that the model's FLOPs are, if a step takes so long."""
        return self.tflops_per_gpu(seconds) * 1e12 / self.cluster.peak(self.precision)
