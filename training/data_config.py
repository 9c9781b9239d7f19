"""Configuration of the data of a pretraining run."""

from __future__ import annotations

from dataclasses import field

from megatron_video.config_io import config_dataclass


@config_dataclass
class DataConfig:
    """Which samples are trained on, and how they are batched."""

    shards: list[str] = field(default_factory=list)
    """Shard folders, read as one data set in this order."""
    buckets: list[str] | None = None
    """Buckets (one frame count and resolution each) to train on; null for all that the shards hold."""
    bucket_weights: dict[str, float] = field(default_factory=dict)
    """Share of the samples drawn from each bucket, which need not sum to 1; names every bucket in use, or is {}:
    every sample of the data set is drawn equally often."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one replica."""
    bucket_micro_batch_sizes: dict[str, int] = field(default_factory=dict)
    """Other micro-batch sizes for single buckets, so that small and large samples cost alike."""
    global_batch_size: int = 1
    """Samples of one optimizer step over all replicas and accumulated micro-batches, counted at micro_batch_size."""
    draw_size: int | None = None
    """Samples drawn together from one bucket; null for micro_batch_size. The order of the data depends on it and not
    on micro_batch_size: set it to keep the order when micro_batch_size has to change."""
    text_dropout: float = 0.1
    """Probability that a sample is trained with the empty caption, for classifier-free guidance."""
    workers: int = 0
    """Processes that read samples and draw their noise; 0 for one thread of the training process."""
    prefetch_steps: int = 2
    """Steps whose batches are built ahead."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not cut evenly.

        Raises:
            ValueError: naming the fields, the values and the way out.
        """
        for name in ("micro_batch_size", "global_batch_size", "prefetch_steps"):
            _check_positive(name, getattr(self, name))
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
        for name, size in self.bucket_micro_batch_sizes.items():
            _check_positive(f"bucket_micro_batch_sizes.{name}", size)

    @property
    def samples_per_draw(self) -> int:
        """Samples drawn together from one bucket, at micro_batch_size."""
        return self.draw_size if self.draw_size is not None else self.micro_batch_size

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one optimizer step over all replicas."""
        return self.global_batch_size // self.micro_batch_size


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _near_multiples(value: int, unit: int) -> str:
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else f"{unit}"
