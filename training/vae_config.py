"""What a training run of the Video-VAE is made of: one dataclass, read from YAML and dotted overrides."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.config_io import config_dataclass
from megatron_video.errors import UserError
from megatron_video.vae import VAEConfig
from megatron_video.vae.config import SPATIAL_STRIDE, num_latent_frames


@config_dataclass
class VAEStage:
    """Some steps at one size. Short and small crops first are many times cheaper than whole clips."""

    steps: int
    """Optimizer steps."""
    frames: int
    """Frames of a video sample; 1 trains on single pictures only."""
    crop: int | None = None
    """Side in pixels of a random square crop; null takes the whole picture."""
    batch_size: int = 4
    """Videos of a step."""
    image_share: float = 0.0
    """Share of the steps that train on single pictures instead, still images and frames of videos alike."""
    image_batch_size: int = 8
    """Pictures of such a step."""

    def __post_init__(self) -> None:
        """Refuse sizes that the VAE cannot encode."""
        if min(self.steps, self.batch_size, self.image_batch_size) < 1:
            raise ValueError(f"steps, batch_size and image_batch_size of a stage must be at least 1: {self}")
        try:
            num_latent_frames(self.frames)
        except UserError as error:
            raise ValueError(f"frames of a stage: {error}") from None
        if self.crop is not None and (self.crop < SPATIAL_STRIDE or self.crop % SPATIAL_STRIDE):
            raise ValueError(f"crop={self.crop} of a stage must be a multiple of {SPATIAL_STRIDE}, or null")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share={self.image_share} of a stage must lie in [0, 1]")


@config_dataclass
class VAETrainConfig:
    """A run of `megatron-video vae train`."""

    manifest: str
    """Clips to train on: a manifest (.parquet) of `megatron-video data`."""
    output: str
    """Folder for the VAE (config.json, model.safetensors), metrics, pictures and the checkpoint."""
    seed: int = 0
    """Of the initial weights, the order of the data, crops, flips and posterior draws."""
    model: VAEConfig = field(default_factory=VAEConfig)
    """Widths of the VAE."""
    buckets: list[str] = field(default_factory=lambda: ["17x192x320", "1x192x320"])
    """Sizes (frames x height x width) that clips are decoded to; a clip goes to the nearest that it fills."""
    stages: list[VAEStage] = field(default_factory=lambda: [VAEStage(steps=100000, frames=17, image_share=0.2)])
    """What is trained on, one after the other; the learning rate has one schedule over all."""
    flip: bool = True
    """Whether pictures are mirrored at random, in both directions."""
    held_out_share: float = 0.05
    """Share of the clips of each bucket that is kept for evaluation, at least one clip of each."""
    max_held_out: int = 24
    """Most clips of each bucket that an evaluation takes."""
    cache_gib: float = 4.0
    """Decoded clips are kept in memory if all of them fit into this; otherwise they are decoded for every step."""
    l1_weight: float = 1.0
    """Of the mean absolute error, pixels in [-1, 1]."""
    mse_weight: float = 0.0
    """Of the mean squared error; it makes small objects on large backgrounds appear early."""
    kl_weight: float = 1e-4
    """Of the KL divergence from a standard normal, in nats per latent element."""
    learning_rate: float = 1e-4
    """Peak, reached after the warm-up, then a cosine down to min_learning_rate."""
    min_learning_rate: float = 1e-6
    """At the last step."""
    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW."""
    weight_decay: float = 0.0
    """Of AdamW, on all parameters."""
    clip_grad_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the network; weights, losses and optimizer are fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA where there is one."""
    log_every: int = 20
    """Steps between console lines and TensorBoard points."""
    evaluate_every: int = 1000
    """Steps between evaluations on the held-out clips; the last step always has one."""
    save_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        """Refuse contradictions by name."""
        if not self.stages:
            raise ValueError("stages is empty; name at least one")
        if min(self.log_every, self.evaluate_every, self.save_every) < 1:
            raise ValueError("log_every, evaluate_every and save_every must be at least 1")
        if not 0 < self.held_out_share < 1 or self.max_held_out < 1:
            raise ValueError(f"held_out_share={self.held_out_share} must lie in (0, 1), max_held_out be at least 1")
        parsed = self.parsed_buckets()
        videos = [bucket for bucket in parsed if bucket.frames > 1]
        for stage in self.stages:
            if stage.frames > 1 and not videos:
                raise ValueError(f"a stage has frames={stage.frames} but no bucket of {self.buckets} holds videos")
            short = [bucket.name for bucket in videos if 1 < bucket.frames < stage.frames]
            if short:
                raise ValueError(f"a stage has frames={stage.frames}, more than bucket {short[0]}")
            small = [b.name for b in parsed if stage.crop and stage.crop > min(b.height, b.width)]
            if small:
                raise ValueError(f"crop={stage.crop} of a stage is larger than bucket {small[0]}")

    def parsed_buckets(self) -> tuple[Bucket, ...]:
        """Buckets in ascending order.

        Raises:
            ValueError: one is not FRAMESxHEIGHTxWIDTH or does not fit the VAE.
        """
        try:
            return tuple(sorted({parse_bucket(text) for text in self.buckets}))
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> VAEStage:
        """Stage of `step`, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError("step lies after the last stage")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of `step`, from 0: warm-up that reaches the peak at step warmup_steps - 1, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps - 1, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine
