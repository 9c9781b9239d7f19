"""Table 2 of the paper (arXiv 2502.10248, 6.2.2): nine layouts of the 540P stage and their MFU by its emulator."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_video.dit.config import DiTConfig
from megatron_video.flops import latent_shape
from megatron_video.parallel import ParallelConfig
from training.planner.cluster import Cluster, load_cluster
from training.planner.job import Job
from training.planner.shape import ModelShape
from training.planner.work import MicroBatch

CLUSTER = "h800_step_video"
# Its Table 6: the first 540P stage has 2 samples a node. How many micro-batches a pipeline gets follows from it.
SAMPLES_PER_NODE = 2


@dataclass(frozen=True)
class Row:
    """One layout as printed."""

    tensor_parallel: int
    context_parallel: int
    pipeline: int
    chunks: int | None
    recomputed_percent: float
    mfu_percent: float
    fits: str = ""
    """The constant of the cluster that was fitted on this row; empty: a row to check against."""

    @property
    def name(self) -> str:
        """Such as TP8 CP2 PP4 VPP12."""
        sizes = f"TP{self.tensor_parallel} CP{self.context_parallel} PP{self.pipeline}"
        return f"{sizes} VPP{self.chunks}" if self.chunks else sizes

    def job(self, cluster: Cluster) -> Job:
        """204 x 544 x 992, two samples a node, on the paper's number of nodes."""
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel,
            sequence_parallel=True,
            context_parallel_size=self.context_parallel,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.chunks,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            recompute_granularity="full",
        )
        sample = MicroBatch(1, latent_shape(204, 544, 992).tokens)
        step = {sample: SAMPLES_PER_NODE * cluster.gpus / cluster.gpus_per_node}
        # Embedders for every chunk would take up to 20 GiB, and the emulator's rows leave no room for them.
        shape = replace(ModelShape.of(DiTConfig()), embedders_in_every_chunk=False)
        return Job(shape, parallel, cluster, step, recomputed=self.recomputed_percent / 100)


ROWS = (
    Row(4, 1, 2, 24, 93.75, 35.90, fits="gemm"),
    # 96 chunks of 48 layers: the row is odd as printed.
    Row(4, 1, 4, 24, 93.75, 35.71),
    # The layout that was trained with.
    Row(8, 1, 1, None, 83.33, 35.59, fits="attention"),
    Row(8, 1, 2, 24, 72.91, 36.06),
    Row(8, 1, 4, 12, 72.91, 35.76),
    Row(8, 2, 1, None, 62.50, 31.79, fits="nic"),
    Row(8, 2, 4, 12, 31.25, 35.11),
    Row(8, 3, 1, None, 31.25, 33.41),
    Row(8, 3, 4, 12, 11.53, 36.47),
)


def table_2_cluster() -> Cluster:
    """The paper's."""
    return load_cluster(CLUSTER)
