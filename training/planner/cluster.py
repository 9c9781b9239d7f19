"""A cluster as the planner sees it: what its devices and links can do, and how much of that kernels reach."""

from __future__ import annotations

import math
from dataclasses import field
from pathlib import Path
from typing import Literal

from megatron_video.config_io import config_dataclass, load_config
from megatron_video.errors import UserError
from training.planner.cluster_life import Failures, Jitter, Storage

CLUSTER_DIR = Path(__file__).parent.parent / "configs" / "clusters"
GIB = 2**30
GIGA = 1e9
# Of `gemm`, at about twice the peak: casts and writes take their time as before.
_FP8_SHARE = 0.7

NumberType = Literal["fp32", "bf16", "fp8"]


@config_dataclass
class Efficiency:
    """Share of a peak that kernels and collectives reach. Measured on the machine if possible."""

    gemm: float = 0.65
    """Matrix products, of the peak of their type."""
    gemm_fp8: float | None = None
    """The same in FP8, of its peak, casts included; null: 0.7 of `gemm`. With it FP8 makes a dense language model of 8B
    about 1.3 times as fast, as torchtitan reports."""
    attention: float = 0.5
    """Self- and cross-attention, of the peak of the activations' type. Backward is counted with the scores that it
    computes again: 10 s^2 d beside the 4 s^2 d of forward."""
    hbm: float = 0.8
    """Norms, modulation, residuals, activation function, optimizer: of the memory's bandwidth."""
    nvlink: float = 0.8
    """All-gather and reduce-scatter inside a node."""
    nic: float = 0.6
    """Anything that leaves a node."""
    convolution: float = 0.4
    """Convolutions of the Video-VAE, of the peak of their type. Assumed: channels-last kernels, which made the paper's
    encoder up to 7 times as fast (arXiv 2502.10248, 6.2.3)."""

    def __post_init__(self) -> None:
        """Refuse shares that are none.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("gemm", "gemm_fp8", "attention", "hbm", "nvlink", "nic", "convolution"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must lie above 0 and at most be 1")


@config_dataclass
class Cluster:
    """GPUs of one type in nodes of one kind. Bandwidths are of one device, in one direction, in 10^9 bytes a second."""

    gpu: str
    """Type, for tables."""
    gpus: int
    """Of the whole job."""
    gpus_per_node: int = 8
    """Devices that NVLink connects."""
    memory_gib: float
    """Of one device."""
    reserved_gib: float = 6.0
    """Not for tensors: CUDA context, NCCL's buffers, what the allocator cannot use."""
    peak_tflops: dict[NumberType, float]
    """Dense TFLOP/s of one device by number type."""
    hbm_gbps: float
    """Bandwidth of the device's memory."""
    nvlink_gbps: float
    """Inside a node."""
    nic_gbps: float
    """Between nodes, of the part of the network cards that falls to one device."""
    host_gbps: float = 25.0
    """Between host and device."""
    efficiency: Efficiency = field(default_factory=Efficiency)
    """How much of these is reached."""
    hidden_tensor_parallel: float = 0.0
    """Share of tensor-parallel communication that runs beside matrix products: 0 where collectives and products take
    turns, as in this project; StepCCL (arXiv 2502.10248, 6.2.2) hides most of it."""
    price_per_gpu_hour: float | None = None
    """What an hour of one device costs; null leaves costs out."""
    currency: str = "USD"
    """Of the price."""
    watts_per_gpu: float | None = None
    """Mean power while training of one device with its share of the node, fans and cooling; null leaves energy out."""
    jitter: Jitter = field(default_factory=Jitter)
    """How unequal its nodes are."""
    failures: Failures = field(default_factory=Failures)
    """How often jobs end, and what a restart takes."""
    storage: Storage = field(default_factory=Storage)
    """Its file system."""

    def __post_init__(self) -> None:
        """Refuse what no machine has.

        Raises:
            ValueError: naming the field and the value.
        """
        positive = ("gpus", "gpus_per_node", "memory_gib", "hbm_gbps", "nvlink_gbps", "nic_gbps", "host_gbps")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.hidden_tensor_parallel <= 1:
            raise ValueError(f"hidden_tensor_parallel={self.hidden_tensor_parallel} must lie between 0 and 1")
        if not 0 <= self.reserved_gib < self.memory_gib:
            raise ValueError(f"reserved_gib={self.reserved_gib} must be at least 0 and below memory_gib")
        for name in ("price_per_gpu_hour", "watts_per_gpu"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        unusable = {name: peak for name, peak in self.peak_tflops.items() if peak <= 0}
        if unusable or "bf16" not in self.peak_tflops:
            raise ValueError(f"peak_tflops={self.peak_tflops} must have bf16, and numbers above 0")

    def peak(self, number_type: NumberType) -> float:
        """Dense FLOP/s of one device.

        Raises:
            UserError: the description does not say.
        """
        if number_type not in self.peak_tflops:
            known = ", ".join(self.peak_tflops)
            raise UserError(f"the cluster's peak_tflops has {known} and not {number_type}; add it")
        return self.peak_tflops[number_type] * 1e12

    def gemm_flops_per_second(self, number_type: NumberType) -> float:
        """Reached by matrix products.

        Raises:
            UserError: the description does not have their peak.
        """
        reached = self.efficiency.gemm
        if number_type == "fp8":
            given = self.efficiency.gemm_fp8
            reached = _FP8_SHARE * reached if given is None else given
        return self.peak(number_type) * reached

    @property
    def usable_bytes(self) -> float:
        """Of one device, for tensors."""
        return (self.memory_gib - self.reserved_gib) * GIB

    @property
    def hbm_bytes_per_second(self) -> float:
        """Reached by kernels that only move numbers."""
        return self.hbm_gbps * GIGA * self.efficiency.hbm

    @property
    def nic_bytes_per_second(self) -> float:
        """Reached by one device's traffic to other nodes."""
        return self.nic_gbps * GIGA * self.efficiency.nic

    @property
    def nvlink_bytes_per_second(self) -> float:
        """Reached inside a node."""
        return self.nvlink_gbps * GIGA * self.efficiency.nvlink

    def gather_seconds(self, total_bytes: float, ranks: int, stride: int) -> float:
        """All-gather or reduce-scatter of `total_bytes` over `ranks` that are `stride` apart.

        A ring enters and leaves each node once, over the network cards of all members there.
        """
        inside = self._members_in_node(ranks, stride)
        # Over all members: what one of them has to receive, and pass on.
        moved = total_bytes * (ranks - 1) / ranks
        if inside == ranks:
            return moved / self.nvlink_bytes_per_second
        return moved / min(self.nvlink_bytes_per_second, self.nic_bytes_per_second * inside)

    def exchange_seconds(self, rank_bytes: float, ranks: int, stride: int) -> float:
        """All-to-all in which each of `ranks` holds `rank_bytes` and sends every other an equal part."""
        inside = self._members_in_node(ranks, stride)
        to_others = rank_bytes * (ranks - inside) / ranks / self.nic_bytes_per_second
        return max(to_others, rank_bytes * (inside - 1) / ranks / self.nvlink_bytes_per_second)

    def send_seconds(self, sent_bytes: float, ranks: int, stride: int) -> float:
        """One message from each of `ranks` to the next one, `stride` away; the slowest counts."""
        inside = self._members_in_node(ranks, stride) == ranks
        return sent_bytes / (self.nvlink_bytes_per_second if inside else self.nic_bytes_per_second)

    @property
    def nodes(self) -> int:
        """Of the job, the last one perhaps not full."""
        return math.ceil(self.gpus / self.gpus_per_node)

    def _members_in_node(self, ranks: int, stride: int) -> int:
        """Of the node with the fewest: groups lie behind one another, and may straddle nodes."""
        node = math.gcd(min(self.gpus_per_node, self.gpus), ranks * stride)
        return min(ranks, max(1, node // stride))


def load_cluster(source: str | Path, overrides: tuple[str, ...] = ()) -> Cluster:
    """From a YAML file, or the name of one in training/configs/clusters.

    Raises:
        UserError: no such file, an unknown field, or a number that means nothing.
    """
    return load_config(Cluster, source, overrides, CLUSTER_DIR)
