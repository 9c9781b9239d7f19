"""From text states and noise to latents, and from decoded video to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_video.dit.config import DiTConfig
from megatron_video.sampler import VelocityFunction, sample_latents
from megatron_video.text import TextStates, collate_text


class Denoiser(Protocol):
    """A VideoDiT, or what computes the same on several ranks."""

    dit_config: DiTConfig

    def __call__(self, latents: Tensor, /, *conditions: Tensor | None) -> Tensor:
        """Velocity, from the arguments of `VideoDiT.forward` by position."""


def velocity_function(
    model: Denoiser, prompts: Sequence[TextStates], negative: TextStates, fps: float | None = None
) -> VelocityFunction:
    """The model under fixed text, for `sample_latents`: rows are [prompt 0..b-1, negative x b] or the prompts alone.

    Args:
        model: the whole DiT in eval mode; all ranks that compute it together call it alike.
        prompts: text states of the b prompts, on the model's device.
        negative: text states that guidance moves away from; the empty caption is the null text.
        fps: frames per second, for a model that was trained with that condition.
    """
    # Collated once for all steps; `sample_latents` says by the number of rows whether the negative half is wanted.
    rows = [*prompts, *[negative] * len(prompts)]
    text = collate_text([states.llm for states in rows], [states.clip for states in rows])
    has_clip = model.dit_config.clip_channels is not None
    # Without CLIP states, the visible length is that of the Step-LLM tokens alone.
    lengths = text.text_lengths if has_clip else text.text_lengths - text.clip_states.shape[1]

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        count = len(x)
        clip = text.clip_states[:count] if has_clip else None
        rates = None if fps is None else torch.full((count,), fps, device=x.device)
        out: Tensor = model(x, time, text.llm_states[:count], clip, lengths[:count], rates)
        return out

    return velocity


def generate_latents(
    model: Denoiser,
    prompts: Sequence[TextStates],
    negative: TextStates,
    noise: Tensor,
    sigmas: Tensor,
    guidance_scale: float,
    *,
    fps: float | None = None,
    round_initial_to_bf16: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample latents for b prompts: noise [b, T, C, h, w] fp32 -> latents of that shape, fp32.

    See `velocity_function` and `sample_latents` for the arguments.
    """
    return sample_latents(
        velocity_function(model, prompts, negative, fps),
        noise,
        sigmas,
        guidance_scale,
        round_initial_to_bf16=round_initial_to_bf16,
        on_step=on_step,
    )


def to_pixels(video: Tensor) -> npt.NDArray[np.uint8]:
    """Decoded video [T, 3, H, W] in about [-1, 1] -> uint8 [T, H, W, 3], rounded to the nearest value."""
    scaled = (video.float().clamp(-1, 1) + 1) * 127.5
    pixels: npt.NDArray[np.uint8] = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels
