"""One layout judged: does it work, does it fit, how fast is it, what does the run cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_video.layout_rules import broken_rule
from megatron_video.parallel import ParallelConfig
from training.config import PretrainConfig
from training.planner.cluster import GIB, Cluster
from training.planner.job import Job
from training.planner.memory import Memory, peak_memory
from training.planner.shape import ModelShape
from training.planner.step_time import Seconds, step_seconds
from training.planner.work import MicroBatch

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Plan:
    """A layout that works, with its memory and time."""

    job: Job
    """What was judged."""
    memory: list[Memory]
    """Of every pipeline stage."""
    seconds: Seconds
    """Of one step."""
    steps: int
    """Of the run."""
    gpus: int
    """Of the cluster; some may be left idle."""

    @property
    def parallel(self) -> ParallelConfig:
        """The layout."""
        return self.job.parallel

    @property
    def peak(self) -> Memory:
        """Of the fullest stage."""
        return max(self.memory, key=lambda memory: memory.total)

    def seconds_with_waits(self, slowest: float) -> float:
        """Of a step whose slowest replica's own part is `slowest` times the mean one's; gradients meet behind it."""
        return self.seconds.total + (slowest - 1) * (self.seconds.busy + self.seconds.bubble)

    @property
    def mfu_percent(self) -> float:
        """Model FLOPs over the peak of all GPUs, idle ones too."""
        return 100 * self.job.mfu(self.seconds.total) * self.job.cluster.gpus / self.gpus

    @property
    def mechanisms(self) -> int:
        """How much there is to go wrong: ways in which the model is cut, beside data parallelism with ZeRO-1."""
        parallel = self.parallel
        return sum(
            (
                parallel.tensor_model_parallel_size > 1,
                parallel.context_parallel_size > 1,
                parallel.pipeline_model_parallel_size > 1,
                parallel.virtual_pipeline_model_parallel_size is not None,
                parallel.use_megatron_fsdp,
            )
        )

    @property
    def gpu_hours(self) -> float:
        """Of the run, nothing going wrong."""
        return self.seconds.total * self.steps * self.gpus / HOUR

    @property
    def cost(self) -> float | None:
        """Of the run; None without a price."""
        price = self.job.cluster.price_per_gpu_hour
        return None if price is None else price * self.gpu_hours

    def values(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "layout": describe(self.parallel),
            "parallel": fields(self.parallel),
            "mfu_percent": self.mfu_percent,
            "gpus_used": self.job.cluster.gpus,
            "gpus_idle": self.gpus - self.job.cluster.gpus,
            "tflops_per_gpu": self.job.tflops_per_gpu(self.seconds.total),
            "seconds_per_step": self.seconds.total,
            "seconds": self.seconds.by_part(),
            "tokens_per_second": self.job.tokens / self.seconds.total,
            "tokens_per_second_and_gpu": self.job.tokens / self.seconds.total / self.job.cluster.gpus,
            "samples_per_step": self.job.samples,
            "micro_batches_per_replica": self.job.micro_batches,
            "days": self.seconds.total * self.steps / DAY,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "currency": self.job.cluster.currency,
            "memory_gib": self.peak.total / GIB,
            "memory_gib_by_stage": [{"total": stage.total / GIB, **stage.in_gib()} for stage in self.memory],
            "mechanisms": self.mechanisms,
        }


@dataclass(frozen=True)
class Refusal:
    """A layout that does not work."""

    parallel: ParallelConfig
    """The layout."""
    kind: str
    """In few words, the same for all of its kind."""
    reason: str
    """In full."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {"layout": describe(self.parallel), "refused": self.kind, "reason": self.reason}


def judge(
    config: PretrainConfig,
    cluster: Cluster,
    step: Mapping[MicroBatch, float],
    parallel: ParallelConfig,
    leave_idle: bool = False,
) -> Plan | Refusal:
    """A layout of a run on a cluster: by the table of refusals, then by its memory.

    Args:
        config: of the run.
        cluster: with all GPUs of the job.
        step: micro-batches of one step.
        parallel: the layout, in place of the configuration's.
        leave_idle: leave GPUs out that make no whole replica.
    """
    job = lay_out(config, cluster, step, parallel, leave_idle)
    if isinstance(job, Refusal):
        return job
    memory = peak_memory(job)
    needed, usable = max(stage.total for stage in memory), cluster.usable_bytes
    if needed > usable:
        reason = f"needs {needed / GIB:.1f} GiB of a GPU, and {usable / GIB:.1f} GiB are usable"
        return Refusal(parallel, "out of memory", reason)
    return Plan(job, memory, step_seconds(job), config.training.steps, cluster.gpus)


def lay_out(
    config: PretrainConfig,
    cluster: Cluster,
    step: Mapping[MicroBatch, float],
    parallel: ParallelConfig,
    leave_idle: bool = False,
) -> Job | Refusal:
    """The same by the table of refusals alone; arguments as of `judge`."""
    gpus = cluster.gpus
    if leave_idle and gpus >= parallel.model_parallel_size:
        cluster = replace(cluster, gpus=gpus - gpus % parallel.model_parallel_size)
    layout = replace(config.layout(cluster.gpus), parallel=parallel)
    rule = broken_rule(layout)
    if rule is not None:
        return Refusal(parallel, rule.name, rule.reason.format(layout=layout))
    if cluster.gpus_per_node % parallel.tensor_model_parallel_size:
        reason = (
            f"tensor-parallel ranks talk in every block; nodes of {cluster.gpus_per_node} GPUs cannot be shared out to "
            f"groups of {parallel.tensor_model_parallel_size} that NVLink joins"
        )
        return Refusal(parallel, "tensor parallelism over nodes", reason)
    return Job(
        ModelShape.of(config.model),
        parallel,
        cluster,
        step,
        config.training.precision,
        fp8_share=_fp8_share(config),
        ema=config.ema.decay is not None and config.ema.device == "same",
        optimizer_on_host=config.optimizer.cpu_offload,
    )


def _fp8_share(config: PretrainConfig) -> float:
    if config.fp8.recipe is None:
        return 0.0
    return 1 - (config.fp8.first_layers_bf16 + config.fp8.last_layers_bf16) / config.model.num_layers


def describe(parallel: ParallelConfig) -> str:
    """Such as `TP8 SP CP2 PP4 VPP12 ZeRO-1 recompute 3`."""
    parts = [f"TP{parallel.tensor_model_parallel_size}"]
    if parallel.sequence_parallel:
        parts.append("SP")
    if parallel.context_parallel_size > 1:
        parts.append(f"CP{parallel.context_parallel_size} {parallel.cp_comm_type}")
    if parallel.pipeline_model_parallel_size > 1:
        parts.append(f"PP{parallel.pipeline_model_parallel_size}")
    if parallel.virtual_pipeline_model_parallel_size is not None:
        parts.append(f"VPP{parallel.virtual_pipeline_model_parallel_size}")
    if parallel.use_megatron_fsdp:
        parts.append(f"FSDP {parallel.data_parallel_sharding_strategy}")
    elif parallel.use_distributed_optimizer:
        parts.append("ZeRO-1")
    return " ".join([*parts, _recompute(parallel)])


def _recompute(parallel: ParallelConfig) -> str:
    if parallel.recompute_granularity is None:
        return "recompute none"
    if parallel.recompute_granularity == "selective":
        return "recompute " + "+".join(parallel.recompute_modules)
    layers = parallel.recompute_num_layers
    return "recompute all" if layers is None else f"recompute {layers}"


def fields(parallel: ParallelConfig) -> dict[str, Any]:
    """Fields that are not at their defaults: what a configuration would say."""
    from megatron_video.config_io import config_to_dict

    mine, default = config_to_dict(parallel), config_to_dict(ParallelConfig())
    return {name: value for name, value in mine.items() if value != default[name]}
