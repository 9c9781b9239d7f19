"""What a training run of the Video-VAE is made of: one dataclass, read from YAML and dotted overrides."""

from __future__ import annotations

import math
from dataclasses import field
from pathlib import Path
from typing import Literal

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.config_io import config_dataclass
from megatron_video.errors import UserError
from megatron_video.vae import VAEConfig
from megatron_video.vae.config import SPATIAL_STRIDE, num_latent_frames

PRESET_DIR = Path(__file__).parent / "configs" / "vae"

Kind = Literal["base", "dual_path"]
Trains = Literal["dual_path", "middle", "all"]


@config_dataclass
class VAEStage:
    """Some steps at one size. Short and small crops first are many times cheaper than whole clips.

    The paper trains a 4x8x8 VAE without the dual path first, then inserts the dual-path modules (8x16x16) and unfreezes
    them, the middle blocks and the backbone one after the other (reference paper 2.3); steps are not published.
    """

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
    kind: Kind = "dual_path"
    """base: 4x8x8, without the dual-path modules; dual_path: the whole VAE, 8x16x16, from the base's weights."""
    trains: Trains = "all"
    """Parts that are not frozen: the dual-path modules alone, those and the middle blocks, or all."""

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
        if self.kind == "base" and self.trains != "all":
            raise ValueError(
                f"trains={self.trains} of a stage with kind=base: the base VAE is always trained as a whole"
            )

    @property
    def phase(self) -> tuple[Kind, Trains]:
        """Stages that follow each other with the same phase share the optimizer's state."""
        return self.kind, self.trains


@config_dataclass
class PerceptualConfig:
    """LPIPS (Zhang et al. 2018) of every frame, from local weights; the paper names it, not its weight."""

    weight: float = 0.0
    """Of the mean over frames; 0 leaves it out."""
    vgg: str | None = None
    """VGG16 in torchvision's layout (`features.0.weight` ...), .pth or .safetensors."""
    heads: str | None = None
    """Linear heads in the layout of LPIPS 0.1 (`lin0.model.1.weight` ...), .pth or .safetensors."""
    max_frames: int | None = None
    """Frames of a clip that are compared, evenly spaced; null is all."""

    def __post_init__(self) -> None:
        """Refuse a loss without its weights."""
        if not self.weight >= 0:
            raise ValueError(f"perceptual.weight={self.weight:g} must not be negative")
        if self.weight and (self.vgg is None or self.heads is None):
            raise ValueError(
                f"perceptual.weight={self.weight:g} needs perceptual.vgg={self.vgg} and perceptual.heads={self.heads}"
            )
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"perceptual.max_frames={self.max_frames} must be at least 1, or null for all")


@config_dataclass
class AdversarialConfig:
    """A 3D PatchGAN with hinge loss, added once the other losses converged, as in the paper; all numbers are ours."""

    weight: float = 0.0
    """Of the generator's loss, after it was scaled to the gradient of the other losses at the frames; 0 is off."""
    start: int | Literal["converged"] = "converged"
    """Step from which it counts; converged: in the last phase, when the held-out PSNR stopped rising."""
    patience: int = 3
    """converged: this many evaluations in a row brought together less than `min_gain` over the best before them."""
    min_gain: float = 0.1
    """In dB."""
    channels: int = 64
    """Of the discriminator's first layer; they double with each of its layers, up to eight times."""
    num_layers: int = 3
    """Layers that halve height and width."""
    learning_rate: float = 1e-4
    """Of the discriminator (AdamW, betas 0.5 and 0.9)."""
    warmup_steps: int = 0
    """Steps that train the discriminator alone, before the VAE sees its loss."""
    max_scale: float = 1e4
    """Largest factor of the scaling."""

    def __post_init__(self) -> None:
        """Refuse sizes of nothing."""
        if not self.weight >= 0 or not self.learning_rate > 0:
            raise ValueError(
                f"adversarial.weight={self.weight:g} must not be negative, "
                f"adversarial.learning_rate={self.learning_rate:g} must be above 0"
            )
        for name in ("patience", "channels", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"adversarial.{name}={getattr(self, name)} must be at least 1")
        if self.channels % 8:
            raise ValueError(f"adversarial.channels={self.channels} must be a multiple of 8 (groups of its norms)")
        if isinstance(self.start, int) and self.start < 0:
            raise ValueError(f"adversarial.start={self.start} counts steps from 0, or is 'converged'")


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
    base_latent_channels: int = 16
    """Channels of the latents of base stages (4x8x8); 16 is the released first version's, the paper has no number."""
    initial_weights: str | None = None
    """A Video-VAE to start from: a folder of a run, also of one with base stages alone, or the released file."""
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
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """Discriminator."""
    learning_rate: float = 1e-4
    """Peak, reached after the warm-up, then a cosine down to min_learning_rate."""
    min_learning_rate: float = 1e-6
    """At the last step."""
    warmup_steps: int = 1000
    """Steps of linear warm-up; again at the start of each phase, which begins with a new optimizer."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW."""
    weight_decay: float = 0.0
    """Of AdamW, on all parameters."""
    clip_grad_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the network; weights, losses and optimizer are fp32."""
    ema_decay: float | None = None
    """Of the averaged weights that are evaluated and written at the end; null takes the weights themselves."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed ZeRO: what is split over the ranks (1 optimizer state, 2 and gradients, 3 and weights). null is plain
    torch in one process, and 2 in several."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA where there is one."""
    log_every: int = 20
    """Steps between console lines and TensorBoard points."""
    evaluate_every: int = 1000
    """Steps between evaluations on the held-out clips; the last step always has one."""
    evaluate_first: bool = True
    """Whether the weights the run starts from are evaluated too, to be shown beside the trained ones."""
    save_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        """Refuse contradictions by name."""
        if not self.stages:
            raise ValueError("stages is empty; name at least one")
        self._check_numbers()
        if min(self.log_every, self.evaluate_every, self.save_every) < 1:
            raise ValueError("log_every, evaluate_every and save_every must be at least 1")
        if not 0 < self.held_out_share < 1 or self.max_held_out < 1:
            raise ValueError(f"held_out_share={self.held_out_share} must lie in (0, 1), max_held_out be at least 1")
        self._check_phases()
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

    def _check_numbers(self) -> None:
        for name in ("learning_rate", "clip_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        weights = ("l1_weight", "mse_weight", "kl_weight", "weight_decay")
        for name in (*weights, "min_learning_rate", "warmup_steps", "cache_gib", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")

    def _check_phases(self) -> None:
        order = {("base", "all"): 0, ("dual_path", "dual_path"): 1, ("dual_path", "middle"): 2, ("dual_path", "all"): 3}
        ranks = [order[stage.phase] for stage in self.stages]
        if ranks != sorted(ranks):
            phases = ", ".join("/".join(stage.phase) for stage in self.stages)
            raise ValueError(f"stages are {phases} (kind/trains): base comes first, and what was unfrozen stays so")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in (0, 1), or be null")
        if self.ema_decay is not None and self.zero_stage == 3:
            raise ValueError("ema_decay needs whole weights on every rank, zero_stage=3 splits them; take 1 or 2")

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

    def phase_start(self, step: int) -> int:
        """First step of the phase that `step` belongs to."""
        phase, start, first = self.stage_at(step).phase, 0, 0
        for before, stage in zip([None, *self.stages], self.stages, strict=False):
            start = first if before is None or before.phase != stage.phase else start
            if stage.phase == phase:
                return start
            first += stage.steps
        raise IndexError("step lies after the last stage")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of `step`, from 0: warm-up that reaches the peak at step warmup_steps - 1, then a cosine.

        Later phases warm up too, to where the cosine is.
        """
        done = step - self.phase_start(step)
        return self._cosine(step) * min(1.0, (done + 1) / max(self.warmup_steps, 1))

    def _cosine(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps - 1, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * cosine
