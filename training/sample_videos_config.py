"""Sample videos during training."""

from __future__ import annotations

from megatron_video.buckets import parse_bucket
from megatron_video.config_io import config_dataclass
from megatron_video.errors import UserError
from megatron_video.sampler import uses_negative
from megatron_video.scheduler import sigmas


@config_dataclass
class SampleVideosConfig:
    """What is sampled, how often, and with which models."""

    every: int = 0
    """Steps between sets of samples, and one after the last step; 0 for none."""
    prompts: str | None = None
    """.txt, one prompt a line, or .jsonl with {"prompt": ..., "seed": ...}."""
    limit: int | None = 8
    """First prompts of the file that are used; null for all."""
    text: str | None = None
    """Folder with the text encoders. They run once, before the model is built; the run's folder keeps the states."""
    vae: str | None = None
    """Video-VAE folder or released file, read anew for each set of samples and given up after it."""
    size: str | None = None
    """FRAMESxHEIGHTxWIDTH of the samples; null for the largest bucket of the training data."""
    fps: float = 25.0
    """Frames per second of the written videos, and of the model's condition where it has one."""
    steps: int = 50
    """Euler steps."""
    guidance: float = 9.0
    """Classifier-free guidance scale; 1 for none."""
    time_shift: float = 13.0
    """Density of steps near noise; 1 for even steps."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    seed: int = 0
    """Of prompts that bring none; not the run's, so that runs of different seeds draw from one noise."""
    batch_size: int = 1
    """Prompts sampled together on one replica."""
    ema: bool = True
    """Sample with the averaged weights where there are any (ema.decay), else with the trained ones."""

    def __post_init__(self) -> None:
        """Refuse what could not be sampled.

        Raises:
            ValueError: naming the fields, the values and the way out.
        """
        if self.every < 0:
            raise ValueError(f"every={self.every} must not be negative")
        for name in ("batch_size", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1, or null for all")
        # Here and not at the first sample, hours later.
        try:
            uses_negative(self.guidance)
            sigmas(self.steps, self.time_shift)
            if self.size is not None:
                parse_bucket(self.size)
        except UserError as refusal:  # pydantic collects ValueErrors
            raise ValueError(str(refusal)) from None
        missing = [name for name in ("prompts", "text", "vae") if getattr(self, name) is None]
        if self.every and missing:
            raise ValueError(
                f"every={self.every} needs {', '.join(missing)}: latents alone are nothing to look at; "
                "every=0 switches samples off"
            )

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether samples follow `step`, counted from 1."""
        return self.every > 0 and (step % self.every == 0 or step == last_step)
