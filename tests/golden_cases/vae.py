"""Golden cases of the Video-VAE: moments, the posterior draw, and decoding, against the reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_video.vae import VAEConfig, VideoVAE, sample_posterior
from megatron_video.vae.checkpoint import check_weights

TOLERANCE = 5e-5
CONFIG_FIELDS = {
    "z": "latent_channels",
    "num_res_blocks": "num_res_blocks",
    "enc_ch": "encoder_channels",
    "enc_ch_mult": "encoder_multipliers",
    "dec_ch": "decoder_channels",
    "dec_ch_mult": "decoder_multipliers",
    "frame_len": "chunk_frames",
    "latent_len": "chunk_latents",
}


def run(case_json: dict[str, Any], tensors: dict[str, Tensor], golden_dir: Path, name: str) -> None:
    """Compare every output that the case holds; AssertionError names the tensor and its largest difference."""
    errors = max_errors(case_json, tensors)
    assert errors, f"{name}: the case holds no output that this reader knows"
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"{name}: largest absolute difference over {TOLERANCE}: {wrong}"


@torch.inference_mode()
def max_errors(case_json: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of each output tensor of the case."""
    values = {field: case_json["config"][key] for key, field in CONFIG_FIELDS.items() if key in case_json["config"]}
    vae = VideoVAE(VAEConfig(**values))
    outputs: dict[str, Tensor] = {}
    if _load(vae, "encoder", tensors):
        outputs |= _encode(vae, tensors)
    if _load(vae, "decoder", tensors):
        outputs |= _decode(vae, tensors)
    expected = {key for key in tensors if key.startswith("out.")}
    assert expected <= outputs.keys(), f"outputs without a known input: {sorted(expected - outputs.keys())}"
    return {key: _max_difference(outputs[key], tensors[key]) for key in sorted(expected)}


def _load(vae: VideoVAE, part: str, tensors: dict[str, Tensor]) -> bool:
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith(f"sd.{part}.")}
    if not weights:
        return False
    holder = torch.nn.ModuleDict({part: getattr(vae, part)})
    check_weights(holder, weights, f"{part} of the case")
    holder.load_state_dict(weights)
    return True


def _encode(vae: VideoVAE, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # in.video -> out.video_moments, in.nine_frames -> out.nine_moments, in.NAME -> out.NAME_moments.
    inputs = [key for key in tensors if key.startswith("in.") and not key.endswith("latents")]
    names = [key.removeprefix("in.") for key in inputs]
    outputs = {}
    for name in names:
        stem = name.removesuffix("_frames")
        moments = vae.encode_moments(tensors[f"in.{name}"])
        outputs[f"out.{name}_moments"] = outputs[f"out.{stem}_moments"] = moments
        noise = tensors.get(f"sample.{stem}_noise", tensors.get("sample.noise"))
        if noise is not None and f"out.{stem}_sample" in tensors:
            outputs[f"out.{stem}_sample"] = sample_posterior(moments, noise)
    return outputs


def _decode(vae: VideoVAE, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # in.latents -> out.video and out.video_unmixed, in.NAME_latents -> out.NAME and out.NAME_unmixed.
    outputs = {}
    for key in [key for key in tensors if key.startswith("in.") and key.endswith("latents")]:
        stem = key.removeprefix("in.").removesuffix("latents").rstrip("_") or "video"
        outputs[f"out.{stem}"] = vae.decode(tensors[key])
        outputs[f"out.{stem}_unmixed"] = vae.decode(tensors[key], mix_seams=False)
    return outputs


def _max_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    return (actual.double() - expected.double()).abs().max().item()
