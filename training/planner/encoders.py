"""Encoding beside training, or ahead of it: how many GPUs, how many hours, how many bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_video.buckets import parse_bucket
from megatron_video.errors import UserError
from megatron_video.text.step_llm import StepLLMConfig
from megatron_video.vae.config import VAEConfig
from training.config import PretrainConfig
from training.planner.cluster import GIB, Cluster
from training.planner.encoder_work import ClipSize, EncoderWork, clip_work, llm_weight_bytes, llm_work, vae_work
from training.planner.failures import DAY
from training.planner.imbalance import slowest_factors
from training.planner.mix import samples_of, step_of
from training.planner.plan import HOUR, Plan, Refusal, judge
from training.planner.report import Report, optional, percent, storage_note
from training.planner.scale import batch_of
from training.planner.shape import ModelShape
from training.planner.stored import latent_bytes, llm_tokens, text_bytes
from training.planner.tables import Formats, Table, number
from training.planner.work import MicroBatch
from training.run_plan import tokens_of

_MONTH = 30.44 * DAY
_EPOCHS = (1, 2, 3, 5, 10, 20)


@dataclass(frozen=True)
class BucketCost:
    """Samples of one size."""

    name: str
    samples_per_step: float
    vae: EncoderWork
    text: EncoderWork
    seconds: float
    """Of one device for one sample."""
    stored_bytes: float
    """Of one sample in a shard."""


@dataclass(frozen=True)
class EncodingPlan:
    """A stage's training beside its encoding."""

    buckets: Sequence[BucketCost]
    plan: Plan
    """Training on all GPUs of the cluster."""
    step_seconds: float
    """Then, with the wait for the slowest replica."""
    split_plan: Plan
    """Training on the part of them that the others can feed."""
    split_step_seconds: float
    split_share: float
    """Of the samples of a step on all GPUs that a step on that part has."""
    headroom: float

    @property
    def cluster(self) -> Cluster:
        """All GPUs."""
        return self.plan.job.cluster

    @property
    def encoding_seconds_per_step(self) -> float:
        """Seconds of one device to encode the samples of one step on all GPUs."""
        return sum(bucket.seconds * bucket.samples_per_step for bucket in self.buckets)

    @property
    def bytes_per_step(self) -> float:
        """Of these samples in shards."""
        return sum(bucket.stored_bytes * bucket.samples_per_step for bucket in self.buckets)

    @property
    def beside(self) -> int:
        """GPUs that must encode, in whole nodes, beside all GPUs of the cluster that train."""
        return feeding_gpus(self.encoding_seconds_per_step / self.step_seconds, self.headroom, self.cluster)

    @property
    def steps(self) -> int:
        """Of the stage."""
        return self.plan.steps

    @property
    def samples(self) -> float:
        """That it draws."""
        return self.steps * sum(bucket.samples_per_step for bucket in self.buckets)

    def encoding_gpu_hours(self, epochs: float = 1.0) -> float:
        """To encode every sample of the data set once, where the stage sees each `epochs` times."""
        return self.steps * self.encoding_seconds_per_step / HOUR / epochs

    def stored_terabytes(self, epochs: float = 1.0) -> float:
        """Of all of them."""
        return self.steps * self.bytes_per_step / 1e12 / epochs

    def break_even_epochs(self) -> float:
        """From how many on encoding ahead costs no more than encoding every time: 1 but for what storage costs."""
        cluster = self.cluster
        price, monthly = cluster.price_per_gpu_hour, cluster.storage.price_per_terabyte_month
        if price is None or monthly is None:
            return 1.0
        ahead, every_time = self._price(self.encoding_gpu_hours(), self.stored_terabytes()), price * self._every_time()
        return max(1.0, (ahead or 0.0) / every_time)

    def ways(self) -> list[dict[str, Any]]:
        """The three ways to have both, for a data set that is seen once."""
        gpus, days = self.plan.gpus, self.steps * self.step_seconds / DAY
        split_steps = self.steps / self.split_share
        ahead = self.encoding_gpu_hours() / gpus * HOUR / DAY
        split_days = split_steps * self.split_step_seconds / DAY
        training = self.split_plan.gpus
        rows = [
            ("ahead of time, on the same GPUs", gpus, gpus, ahead, days, self.stored_terabytes()),
            ("at the same time, on a part of them", training, gpus - training, split_days, split_days, 0.0),
            ("at the same time, on GPUs beside them", gpus, self.beside, days, days, 0.0),
        ]
        return [self._way(*row) for row in rows]

    def epochs(self) -> list[dict[str, Any]]:
        """What encoding costs, by how often a sample is seen."""
        every_time = self._every_time()
        rows = []
        for epochs in _EPOCHS:
            ahead, stored = self.encoding_gpu_hours(epochs), self.stored_terabytes(epochs)
            rows.append(
                {
                    "epochs": epochs,
                    "unique_samples": self.samples / epochs,
                    "every_time_gpu_hours": every_time,
                    "ahead_gpu_hours": ahead,
                    "stored_terabytes": stored,
                    "every_time_cost": self._price(every_time, 0.0),
                    "ahead_cost": self._price(ahead, stored),
                }
            )
        return rows

    def _way(
        self, how: str, training: int, encoding: int, encode_days: float, train_days: float, stored: float
    ) -> dict[str, Any]:
        together = train_days if stored == 0 else encode_days + train_days
        used = max(training, encoding) if stored else training + encoding
        hours = together * DAY / HOUR * used
        return {
            "how": how,
            "training_gpus": training,
            "encoding_gpus": encoding,
            "encoding_days": encode_days,
            "training_days": train_days,
            "days": together,
            "gpu_hours": hours,
            "stored_terabytes": stored,
            "cost": self._price(hours, stored),
        }

    def _every_time(self) -> float:
        """GPU-hours to encode every sample each time it is drawn, spare ones included."""
        return self.encoding_gpu_hours() * (1 + self.headroom)

    def _price(self, gpu_hours: float, terabytes: float) -> float | None:
        cluster = self.cluster
        if cluster.price_per_gpu_hour is None:
            return None
        monthly = cluster.storage.price_per_terabyte_month or 0.0
        return cluster.price_per_gpu_hour * gpu_hours + monthly * terabytes * self._storage_months()

    def _storage_months(self) -> float:
        return self.steps * self.step_seconds / _MONTH


def feeding_gpus(seconds_of_encoding: float, headroom: float, cluster: Cluster) -> int:
    """GPUs that give training its samples in time, in whole nodes.

    Args:
        seconds_of_encoding: of one device, for what is trained on in a second.
        headroom: share that is kept free, for encoders that fail and mixes that are dearer for a while.
        cluster: whose nodes they are.
    """
    nodes = math.ceil(seconds_of_encoding * (1 + headroom) / cluster.gpus_per_node - 1e-9)
    return max(1, nodes) * cluster.gpus_per_node


def plan_encoding(
    config: PretrainConfig, cluster: Cluster, text_tokens: int, headroom: float
) -> EncodingPlan | Refusal:
    """A stage's encoding and training, on its configured layout.

    Args:
        config: of the stage.
        cluster: all GPUs.
        text_tokens: visible text tokens of a sample.
        headroom: of the encoding GPUs.

    Raises:
        UserError: the cluster is too small to share.
    """
    plan = judge(config, cluster, step_of(config, text_tokens), config.parallel, leave_idle=True)
    if isinstance(plan, Refusal):
        return plan
    buckets = bucket_costs(config, cluster, text_tokens)
    seconds = plan.seconds_with_waits(slowest_factors(config, plan.job)[1])
    whole = EncodingPlan(buckets, plan, seconds, plan, seconds, 1.0, headroom)
    training = _training_part(config, cluster, whole)
    part = replace(cluster, gpus=training)
    batch = batch_of(config, cluster, training, "weak")
    smaller = replace(config, data=replace(config.data, global_batch_size=batch))
    split = judge(smaller, part, step_of(smaller, text_tokens), config.parallel)
    if isinstance(split, Refusal):
        return split
    split_seconds = split.seconds_with_waits(slowest_factors(smaller, split.job)[1])
    share = batch / config.data.global_batch_size
    return replace(whole, split_plan=split, split_step_seconds=split_seconds, split_share=share)


def bucket_costs(config: PretrainConfig, cluster: Cluster, text_tokens: int) -> list[BucketCost]:
    """Every bucket of the stage."""
    shape, tokens = ModelShape.of(config.model), tokens_of(config.model, config.data.buckets or [])
    found = []
    for name, (samples, _) in samples_of(config).items():
        sample = MicroBatch(1, tokens[name], text_tokens)
        vae = vae_work(VAEConfig(), *parse_bucket(name))
        text = llm_work(StepLLMConfig(), llm_tokens(shape, sample)) + clip_work(ClipSize())
        stored = latent_bytes(shape, sample) + text_bytes(shape, sample)
        found.append(BucketCost(name, samples, vae, text, encode_seconds(vae + text, cluster), stored))
    return found


def encode_seconds(work: EncoderWork, cluster: Cluster) -> float:
    """Of one device, in bf16."""
    peak, reached = cluster.peak("bf16"), cluster.efficiency
    return (
        work.convolution_flops / (peak * reached.convolution)
        + work.gemm_flops / (peak * reached.gemm)
        + work.attention_flops / (peak * reached.attention)
        + work.moved_bytes / cluster.hbm_bytes_per_second
    )


def encoding_report(found: EncodingPlan, stage: str) -> Report:
    """As tables."""
    cluster = found.cluster
    total = found.encoding_seconds_per_step
    rows = [
        {
            "bucket": bucket.name,
            "samples_per_step": bucket.samples_per_step,
            "vae_tflops": bucket.vae.flops / 1e12,
            "text_tflops": bucket.text.flops / 1e12,
            "gpu_seconds": bucket.seconds,
            "stored_megabytes": bucket.stored_bytes / 1e6,
            "share": bucket.seconds * bucket.samples_per_step / total,
        }
        for bucket in found.buckets
    ]
    priced = cluster.price_per_gpu_hour is not None
    heads = {**_HEADS, "cost": f"cost {cluster.currency}"}
    tables = [
        Table("Encoding of one sample", rows, _BUCKETS, heads),
        Table("Encoding and training, each sample seen once", found.ways(), _priced(_WAYS, priced), heads),
        Table("Encoding by how often a sample is seen", found.epochs(), _priced(_BY_EPOCHS, priced), heads),
    ]
    notes = [
        f"training on {found.plan.gpus:,} {cluster.gpu} takes {found.step_seconds:.2f} s a step, in which "
        f"{total:,.0f} s of one device's encoding fall: {found.beside:,} more GPUs must encode so that it never waits, "
        f"with {100 * found.headroom:g} % to spare, in whole nodes; of {found.plan.gpus:,} in all, "
        f"{found.plan.gpus - found.split_plan.gpus:,}",
        _break_even_note(found),
        "encoders: the released Video-VAE, Step-LLM and HunyuanCLIP in bf16, each sample encoded whole on one device; "
        f"Step-LLM's weights take {llm_weight_bytes(StepLLMConfig()) / GIB:.1f} GiB of it",
        f"efficiencies: convolutions {cluster.efficiency.convolution:g}, matrix products {cluster.efficiency.gemm:g}, "
        f"attention {cluster.efficiency.attention:g} of the bf16 peak; decoding of videos and waits for it are not "
        "counted; failures neither",
        storage_note(cluster),
    ]
    return Report(
        f"Encoding for {stage} on {cluster.gpu}", tables, notes, {"break_even_epochs": found.break_even_epochs()}
    )


_BUCKETS: Formats = {
    "bucket": str,
    "samples_per_step": number(1),
    "vae_tflops": number(1),
    "text_tflops": number(2),
    "gpu_seconds": number(3),
    "stored_megabytes": number(2),
    "share": percent(1),
}
_WAYS: Formats = {
    "how": str,
    "training_gpus": lambda value: f"{value:,}",
    "encoding_gpus": lambda value: f"{value:,}",
    "encoding_days": number(2),
    "training_days": number(2),
    "days": number(2),
    "gpu_hours": number(0),
    "stored_terabytes": number(1),
    "cost": optional(0),
}
_BY_EPOCHS: Formats = {
    "epochs": str,
    "unique_samples": lambda value: f"{value:.3g}",
    "every_time_gpu_hours": number(0),
    "ahead_gpu_hours": number(0),
    "stored_terabytes": number(1),
    "every_time_cost": optional(0),
    "ahead_cost": optional(0),
}
_HEADS = {
    "samples_per_step": "a step",
    "vae_tflops": "VAE TFLOP",
    "text_tflops": "text TFLOP",
    "gpu_seconds": "GPU-s",
    "stored_megabytes": "MB stored",
    "share": "share %",
    "training_gpus": "train",
    "encoding_gpus": "encode",
    "encoding_days": "encoding days",
    "gpu_hours": "GPU-hours",
    "stored_terabytes": "TB stored",
    "every_time_gpu_hours": "GPU-h every time",
    "ahead_gpu_hours": "GPU-h ahead",
    "every_time_cost": "cost every time",
    "ahead_cost": "cost ahead",
}


def _priced(formats: Formats, priced: bool) -> Formats:
    return {name: form for name, form in formats.items() if priced or not name.endswith("cost")}


def _break_even_note(found: EncodingPlan) -> str:
    epochs = found.break_even_epochs()
    storage = found.cluster.storage.price_per_terabyte_month
    if found.cluster.price_per_gpu_hour is None or storage is None:
        return (
            "break-even: a sample that is seen more than once costs less encoded ahead; what its storage costs is not "
            "said (price_per_gpu_hour, storage.price_per_terabyte_month)"
        )
    return (
        "break-even: encoded ahead, with its storage until the stage's end, a sample costs less from "
        f"{epochs:.2f} epochs on"
    )


def _training_part(config: PretrainConfig, cluster: Cluster, whole: EncodingPlan) -> int:
    """The most GPUs that train, in whole replicas and nodes, and that the others feed."""
    size = math.lcm(config.parallel.model_parallel_size, cluster.gpus_per_node)
    per_gpu = whole.encoding_seconds_per_step / whole.step_seconds / whole.plan.job.cluster.gpus
    for training in range(cluster.gpus // size * size, 0, -size):
        if training + feeding_gpus(training * per_gpu, whole.headroom, cluster) <= cluster.gpus:
            return training
    raise UserError(
        f"gpus={cluster.gpus}: too few to share: a replica takes {config.parallel.model_parallel_size} and encoding at "
        f"least a node of {cluster.gpus_per_node}; set more with --set gpus=N"
    )
