"""Configuration of the data of a pretraining run."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from megatron_video.config_io import config_dataclass


@config_dataclass
class DataConfig:
    """Which samples are trained on, and how they are batched."""

    shards: list[str] = field(default_factory=list)
    """Shard folders, read as one data set in this order."""
    shard_weights: list[float] = field(default_factory=list)
    """Share of the samples drawn from each folder of `shards`, which need not sum to 1; []: every sample is drawn
    equally often, whatever folder it is in."""
    blend: str | None = None
    """Instead of `shards` and `shard_weights`: a YAML file of folders and weights (`megatron-video data blend`)."""
    sample_weights: bool = True
    """Draw samples as often as the weights say that `megatron-video data balance` gave them; false: all alike. Shards
    without weights are drawn alike in any case."""
    subsets: list[str] | None = None
    """Train only on samples whose strictest subset (column `subset` of `megatron-video data filter`) is one of these;
    null for all samples. A blend may name subsets of single folders too."""
    buckets: list[str] | None = None
    """Buckets (one frame count and resolution each) to train on; null for all that the shards hold."""
    bucket_weights: dict[str, float] = field(default_factory=dict)
    """Share of the samples drawn from each bucket, which need not sum to 1; names every bucket in use, or is {}:
    every sample of the data set is drawn equally often."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one replica."""
    bucket_micro_batch_sizes: dict[str, int] | Literal["auto"] = field(default_factory=dict)
    """Other micro-batch sizes for single buckets, so that small and large samples cost alike. auto: draws of about
    equal FLOPs (arXiv 2502.10248, Eq. 12) with about draw_size samples on average (a run prints how many), each given
    to one replica and cut into micro-batches of at most as many tokens as micro_batch_size of the longest samples."""
    global_batch_size: int = 1
    """Samples of one optimizer step over all replicas and accumulated micro-batches, counted at micro_batch_size;
    without those of images_per_video."""
    images_per_video: float | None = None
    """Images drawn for every video (1.0: half of all samples are images), on top of global_batch_size, which then
    counts videos alone; they even out what the videos cost on the replicas. Null: buckets of images are drawn like all
    others."""
    balance: Literal["auto", "cost", "none"] = "auto"
    """How a step is shared out to replicas. cost: micro-batches of videos, then single images, each to the replica with
    the least to do; replicas may get different numbers of micro-batches. none: micro-batches are dealt out in turn,
    equally many to each. auto: cost, but for layouts whose replicas need equally many micro-batches (Megatron-FSDP,
    interleaved stages, FP8 with delayed scaling). The samples of a step are the same in all."""
    cost_profile: str | None = None
    """YAML or JSON file of measured seconds by bucket, which balance then goes by; null: the cost model's FLOPs. Of
    one sample (`68x192x320: 0.41`), or of micro-batches by size (`1x192x320: {8: 0.09, 16: 0.14}`)."""
    pack_tokens: int | None = None
    """Join micro-batches that a replica computes one after the other into one sequence of at most so many video tokens,
    in which no sample sees another; larger ones stay alone. The numbers stay the same, and images and short videos fill
    the device. Null: every micro-batch alone."""
    draw_size: int | None = None
    """Samples drawn together from one bucket; null for micro_batch_size. The order of the data depends on it and not
    on micro_batch_size: set it to keep the order when micro_batch_size has to change."""
    text_dropout: float = 0.1
    """Probability that a sample is trained with the empty caption, for classifier-free guidance."""
    caption_weights: dict[str, float] = field(default_factory=dict)
    """Share of the draws in which a sample is trained with each kind of its captions, such as {short: 0.3, dense: 0.7},
    among the kinds that it has; {}: always with its first."""
    workers: int = 0
    """Processes that read samples and draw their noise; 0 for one thread of the training process."""
    prefetch_steps: int = 2
    """Steps whose batches are built ahead."""
    read_attempts: int = 3
    """How often a sample is read before it counts as damaged: network file systems have hiccups."""
    max_corrupt_samples: int = 0
    """Damaged samples that a run may leave out, all replicas together, before it stops; 0 stops at the first."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not cut evenly.

        Raises:
            ValueError: naming the fields, the values and the way out.
        """
        for name in ("micro_batch_size", "global_batch_size", "prefetch_steps", "read_attempts"):
            _check_positive(name, getattr(self, name))
        if self.pack_tokens is not None:
            _check_positive("pack_tokens", self.pack_tokens)
        if self.max_corrupt_samples < 0:
            raise ValueError(f"max_corrupt_samples={self.max_corrupt_samples} must not be negative")
        self._check_sources()
        if self.images_per_video is not None and not 0 < self.images_per_video < float("inf"):
            raise ValueError(f"images_per_video={self.images_per_video} must be above 0, or null")
        _check_shares("caption_weights", self.caption_weights)
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"text_dropout={self.text_dropout} must be between 0 and 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative")
        # A draw has one shape and is cut into whole micro-batches; the step is cut into whole draws.
        if self.samples_per_draw % self.micro_batch_size:
            raise ValueError(
                f"draw_size={self.draw_size} must be a multiple of micro_batch_size={self.micro_batch_size}"
            )
        if self.global_batch_size % self.samples_per_draw:
            near = _near_multiples(self.global_batch_size, self.samples_per_draw)
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of "
                f"{'draw_size' if self.draw_size else 'micro_batch_size'}={self.samples_per_draw}; nearest: {near}"
            )
        for name, weight in self.bucket_weights.items():
            if weight < 0:
                raise ValueError(f"bucket_weights.{name}={weight} must not be negative")
        sizes = self.bucket_micro_batch_sizes
        for name, size in sizes.items() if isinstance(sizes, dict) else ():
            _check_positive(f"bucket_micro_batch_sizes.{name}", size)

    def _check_sources(self) -> None:
        if self.blend is not None and (self.shards or self.shard_weights):
            raise ValueError(
                f"blend={self.blend} names the folders and their weights; leave shards and shard_weights out"
            )
        if self.shard_weights and len(self.shard_weights) != len(self.shards):
            raise ValueError(
                f"shard_weights has {len(self.shard_weights)} shares for {len(self.shards)} folders of shards"
            )
        _check_shares("shard_weights", dict(zip(self.shards, self.shard_weights, strict=False)))
        if self.subsets is not None and not self.subsets:
            raise ValueError("subsets=[] leaves nothing to train on; null takes all samples")

    @property
    def samples_per_draw(self) -> int:
        """Samples drawn together from one bucket, at micro_batch_size."""
        return self.draw_size if self.draw_size is not None else self.micro_batch_size

    @property
    def samples_dealt_together(self) -> int:
        """Samples of the smallest part of a step that is given to one replica: a micro-batch, or an automatic draw."""
        return self.samples_per_draw if self.bucket_micro_batch_sizes == "auto" else self.micro_batch_size

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one optimizer step over all replicas; automatic draws count as one each, however they are
        cut."""
        return self.global_batch_size // self.samples_dealt_together


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _check_shares(name: str, shares: dict[str, float]) -> None:
    if shares and (min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf")):
        raise ValueError(f"{name}={shares}: shares must not be negative, and one of them above 0")


def _near_multiples(value: int, unit: int) -> str:
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else f"{unit}"
