"""Speeds that others published for video DiTs, beside the planner's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_video.parallel import ParallelConfig
from training.planner.cluster import load_cluster
from training.planner.job import Job
from training.planner.shape import ModelShape
from training.planner.step_time import step_seconds
from training.planner.work import MicroBatch

NEMO = "arXiv 2503.12964, Table 1 (sizes); NVIDIA's figures for NeMo (speed)"
DFM = "NVIDIA-NeMo/DFM, docs/performance-summary.md; recompute from its perf recipe"

# arXiv 2503.12964, Table 1: layers, width, heads.
DIT_7B = ModelShape(28, 4096, 32, 4 * 4096, llm_channels=1024, clip_channels=None)
DIT_28B = ModelShape(48, 6144, 48, 4 * 6144, llm_channels=1024, clip_channels=None)
# Wan 2.1 T2V 14B as released.
WAN_14B = ModelShape(40, 5120, 40, 13824, llm_channels=4096, clip_channels=None)
TEXT_TOKENS = 512

# Attention of DFM's Wan, which packs samples (qkv_format thd): fitted on its two Blackwell rows (fit.py).
WAN_ATTENTION = 0.315

_ZERO = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
_FULL = {"recompute_granularity": "full"}


@dataclass(frozen=True)
class Row:
    """One published run."""

    name: str
    """Model and layout."""
    shape: ModelShape
    """Of the model."""
    cluster: str
    """Description in training/configs/clusters."""
    gpus: int
    """Of the run."""
    tokens: int
    """Video tokens of a sample; a micro-batch is one."""
    samples: int
    """Of one step, all GPUs together."""
    parallel: Mapping[str, Any]
    """Fields of ParallelConfig."""
    tflops: float
    """Model TFLOP/s of one GPU, as published."""
    source: str
    """Where."""
    attention: float | None = None
    """Other efficiency of attention than the cluster's."""
    fits: str = ""
    """The constant that was fitted on this row; empty: a row to check against."""
    remark: str = ""
    """What is known of a row that does not come out."""

    def job(self, attention: float | None = None) -> Job:
        """As published; `attention` instead of the row's efficiency."""
        efficiency = self.attention if attention is None else attention
        changes = [f"gpus={self.gpus}", *([f"efficiency.attention={efficiency}"] if efficiency else [])]
        cluster = load_cluster(self.cluster, tuple(changes))
        step = {MicroBatch(1, self.tokens, TEXT_TOKENS): float(self.samples)}
        return Job(self.shape, ParallelConfig(**self.parallel), cluster, step)

    def predicted(self, attention: float | None = None) -> float:
        """The planner's TFLOP/s of one GPU."""
        job = self.job(attention)
        return job.tflops_per_gpu(step_seconds(job).total)


ROWS = (
    # 8 nodes; the number of samples is not published. So many that data-parallel traffic is hidden.
    Row(
        "NeMo DiT 7B, TP2 SP",
        DIT_7B,
        "h100",
        gpus=64,
        tokens=8192,
        samples=256,
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True, **_ZERO},
        tflops=519.0,
        source=NEMO,
    ),
    Row(
        "NeMo DiT 28B, FSDP, full recompute",
        DIT_28B,
        "h100",
        gpus=256,
        tokens=65536,
        samples=256,
        parallel={"use_megatron_fsdp": True, **_FULL},
        tflops=445.0,
        source=NEMO,
    ),
    Row(
        "DFM Wan 14B, CP4, GB200",
        WAN_14B,
        "gb200",
        gpus=32,
        tokens=37440,
        samples=64,
        parallel={"context_parallel_size": 4, "cp_comm_type": "p2p", **_ZERO},
        tflops=787.59,
        source=DFM,
        attention=WAN_ATTENTION,
        fits="attention",
    ),
    Row(
        "DFM Wan 14B, CP2, GB300",
        WAN_14B,
        "gb300",
        gpus=32,
        tokens=37440,
        samples=64,
        parallel={"context_parallel_size": 2, "cp_comm_type": "p2p", **_ZERO},
        tflops=1030.67,
        source=DFM,
        attention=WAN_ATTENTION,
        fits="attention",
    ),
    Row(
        "DFM Wan 14B, TP2 SP CP4, 10 of 40 layers recomputed",
        WAN_14B,
        "h100",
        gpus=128,
        tokens=37440,
        samples=128,
        parallel={
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "context_parallel_size": 4,
            "cp_comm_type": "p2p",
            "recompute_num_layers": 10,
            **_FULL,
            **_ZERO,
        },
        tflops=325.77,
        source=DFM,
        attention=WAN_ATTENTION,
    ),
    Row(
        "DFM Wan 14B, FSDP alone",
        WAN_14B,
        "h100",
        gpus=64,
        tokens=37440,
        samples=64,
        parallel={"use_megatron_fsdp": True, **_FULL},
        tflops=228.85,
        source=DFM,
        attention=WAN_ATTENTION,
        remark="NeMo AutoModel: another program (diffusers in plain PyTorch), whose row on 8 GPUs, with one sample a "
        "GPU too, is 176 TFLOP/s; nothing published of its recomputation and kernels tells the two apart",
    ),
)
