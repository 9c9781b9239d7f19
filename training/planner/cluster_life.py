"""What happens on a cluster over weeks, as fields of its description: slow nodes, failures, storage."""

from __future__ import annotations

from typing import Literal

from megatron_video.config_io import config_dataclass


@config_dataclass
class Jitter:
    """How unequal the steps of equally loaded nodes are. Assumed until measured: a run's straggler_every compares the
    ranks' times."""

    distribution: Literal["lognormal", "gamma", "exponential"] = "lognormal"
    """Of the factor by which a replica's own part of a step is longer, drawn anew for every step; its mean is 1.
    `exponential` is 1 - spread and an exponential tail behind it."""
    spread: float = 0.01
    """Standard deviation of that factor; 0: none."""
    slow_nodes: float = 0.002
    """Share of nodes that are slow all the time (heat, a bad link, a neighbour)."""
    slow_factor: float = 1.1
    """How much longer a step takes them."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution.

        Raises:
            ValueError: naming the field and the value.
        """
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread={self.spread} must be at least 0 and below 1")
        if not 0 <= self.slow_nodes <= 1:
            raise ValueError(f"slow_nodes={self.slow_nodes} is a share: between 0 and 1")
        if self.slow_factor < 1:
            raise ValueError(f"slow_factor={self.slow_factor} must be at least 1")


@config_dataclass
class Failures:
    """How often a job is ended, and what a restart takes. Every end is one of the whole job."""

    per_1000_gpu_days: float = 0.095
    """Unexpected restarts a day of 1,000 devices: `total unexpected` of Table 5 of arXiv 2502.10248, 7 failures of
    hardware and 11 of software; Llama 3.1 had 0.485 (same table). Devices that ran out of memory are not in it."""
    planned_per_1000_gpu_days: float = 0.0211
    """Restarts for maintenance, behind a checkpoint: Table 4 has 4 of them to those 18."""
    detect_seconds: float = 120.0
    """From a failure until the job is ended. This and the next three are assumed: the paper gives no times."""
    replace_seconds: float = 120.0
    """Until a spare node is in its place and the job is started again."""
    start_seconds: float = 180.0
    """Containers, imports, process groups, the model."""
    first_step_seconds: float = 60.0
    """What the first step takes longer than others: kernels are compiled, the loader is filled."""

    def __post_init__(self) -> None:
        """Refuse negative numbers.

        Raises:
            ValueError: naming the field and the value.
        """
        _check_not_negative(self)


@config_dataclass
class Storage:
    """The file system with shards and checkpoints. Assumed: the paper does not describe its own. Llama 3.1's gave 2,000
    GB/s to 16,384 devices (arXiv 2407.21783)."""

    read_gbps: float = 200.0
    """10^9 bytes a second, to all nodes together."""
    write_gbps: float = 100.0
    """From all nodes together."""
    node_gbps: float = 5.0
    """Of one node, either way."""
    save_overhead_seconds: float = 3.0
    """That a save holds training up beside the copy to host memory: planning, agreement of all ranks."""
    price_per_terabyte_month: float | None = None
    """In the cluster's currency; null leaves it out."""

    def __post_init__(self) -> None:
        """Refuse what no file system has.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("read_gbps", "write_gbps", "node_gbps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        _check_not_negative(self)

    def read_bytes_per_second(self, nodes: float) -> float:
        """Reached by so many nodes."""
        return 1e9 * min(self.read_gbps, self.node_gbps * nodes)

    def write_bytes_per_second(self, nodes: float) -> float:
        """Reached by so many nodes."""
        return 1e9 * min(self.write_gbps, self.node_gbps * nodes)


def _check_not_negative(group: object) -> None:
    for name, value in vars(group).items():
        if isinstance(value, float) and value < 0:
            raise ValueError(f"{name}={value} must not be negative")
