"""A whole guided sampling run, from the recorded noise to latents, against the reference pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from golden_cases.dit import assert_close, load_reference_model
from torch import Tensor

from megatron_video.sampler import sample_latents
from megatron_video.scheduler import sigmas

TOLERANCE = 5e-5


def run(meta: dict[str, Any], tensors: dict[str, Tensor], golden_dir: Path, name: str) -> None:
    """Sample with the recorded weights and text states; rows are [prompt, negative], as in the reference."""
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    model = load_reference_model(meta["config"], weights, torch.float32)
    text_lengths = tensors["in.encoder_attention_mask"].sum(dim=1).long()
    clip_states = tensors.get("in.encoder_hidden_states_2")

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        rows = len(x)
        clip = None if clip_states is None else clip_states[:rows]
        return model(x, time, tensors["in.encoder_hidden_states"][:rows], clip, text_lengths[:rows])

    sampler = meta["sampler"]
    latents = sample_latents(
        velocity,
        tensors["in.latents"],
        sigmas(sampler["steps"], sampler["time_shift"]),
        sampler["guidance_scale"],
        round_initial_to_bf16=True,  # the reference keeps its initial noise in bf16
    )
    assert_close(latents, tensors["out.latents"], TOLERANCE, f"{name} latents")
