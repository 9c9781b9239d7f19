"""What a run of `megatron-video sample` has to do: read, checked and looked up before anything big is loaded."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files, vae_fingerprint
from megatron_video.flops import LatentShape, latent_shape
from megatron_video.layout import Precision
from megatron_video.parallel import ParallelConfig, launched_ranks
from megatron_video.sampler import uses_negative
from megatron_video.scheduler import sigmas
from megatron_video.text import text_fingerprint, text_folders
from megatron_video.vae.checkpoint import read_vae_config
from training.checkpoint import find_checkpoint, read_config, read_model_config, read_state
from training.sample_folder import SampleFolder
from training.sample_options import check_layout_options, layout_of
from training.sample_prompts import Prompt, parse_categories, read_prompts, with_seeds
from training.trained_encoders import check_encoders

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_video.device import DeviceInfo
    from megatron_video.dit import DiTConfig

# Values that must be above 0 where they are given.
_COUNTS = ("batch_size", "fps", "seeds", "limit")


@dataclass(frozen=True)
class Job:
    """All that the ranks agree on."""

    arguments: argparse.Namespace
    checkpoint: Path
    model: DiTConfig
    parallel: ParallelConfig
    shape: LatentShape
    times: Tensor
    """[steps + 1] fp32."""
    prompts: list[Prompt]
    precision: Precision
    encoder_precision: Precision
    step: int
    """After which the weights were saved."""
    undecoded: list[int]
    """Indices of the prompts of which an earlier run left the latent alone."""
    unsampled: list[int]
    """Indices of the prompts of which there is nothing."""


def prepare(arguments: argparse.Namespace, device: DeviceInfo) -> tuple[Job, SampleFolder]:
    """Read prompts and sizes, and look at what is there already.

    Raises:
        UserError: an argument that cannot work, by name.
    """
    # In the order in which a user would mend them.
    checkpoint = find_checkpoint(arguments.checkpoint)
    uses_negative(arguments.guidance)
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    job = Job(
        arguments=arguments,
        checkpoint=checkpoint,
        model=read_model_config(checkpoint),
        parallel=layout_of(arguments),
        shape=latent_shape(arguments.frames, arguments.height, arguments.width),
        times=sigmas(arguments.steps, arguments.time_shift),
        prompts=_read_prompts(arguments),
        precision=arguments.precision or read_config(checkpoint).get("training", {}).get("precision", "bf16"),
        # The released API runs them in bf16 on GPUs; on CPUs bf16 convolutions are slower, not faster.
        encoder_precision="bf16" if device.device.type == "cuda" else "fp32",
        step=read_state(checkpoint).step,
        undecoded=[],
        unsampled=[],
    )
    check_layout_options(job.parallel, job.model, job.precision, launched_ranks())
    chosen = settings(job)
    _check_decoder(job)
    if not arguments.other_encoders:
        _compare_encoders(job, chosen)
    folder = SampleFolder(arguments.out, chosen, job.prompts, is_image=arguments.frames == 1)
    missing = folder.missing()
    undecoded = folder.undecoded() if arguments.latents else []
    return replace(job, undecoded=undecoded, unsampled=sorted(set(missing) - set(undecoded))), folder


def settings(job: Job) -> dict[str, Any]:
    """Everything that a sample depends on beside its prompt; batch size and layout are not among it."""
    arguments = job.arguments
    # What is not here may differ between runs into one folder.
    names = ("frames", "height", "width", "fps", "steps", "guidance", "time_shift", "negative_prompt", "ema")
    state_file, weight_files = job.checkpoint / "train_state.json", sorted(job.checkpoint.glob("*.distcp"))
    return {
        "checkpoint": f"{job.checkpoint.name} {fingerprint_files([state_file, *weight_files])}",
        "vae": vae_fingerprint(arguments.vae),
        "text": text_fingerprint(*text_folders(arguments.text)),
        "precision": job.precision,
        "encoder_precision": job.encoder_precision,
        "round_noise_to_bf16": arguments.round_noise_to_bf16,
        # Not in folders without, which are older.
        **({"latents": True} if arguments.latents else {}),
        **{name: getattr(arguments, name) for name in names},
    }


def _read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    categories = parse_categories(arguments.categories) if arguments.categories else None
    listed = read_prompts(arguments.prompts, arguments.seed, arguments.limit, categories)
    return with_seeds(listed, arguments.seeds)


def _check_decoder(job: Job) -> None:
    channels = read_vae_config(job.arguments.vae).latent_channels
    if channels != job.model.out_channels:
        raise UserError(
            f"--vae {job.arguments.vae} has latent_channels={channels}, the model of {job.checkpoint} "
            f"out_channels={job.model.out_channels}; give the VAE it was trained with"
        )


def _compare_encoders(job: Job, chosen: dict[str, Any]) -> None:
    unknown = check_encoders(job.checkpoint, chosen, {"vae": job.arguments.vae, "text": job.arguments.text})
    if unknown:
        print(unknown, file=sys.stderr)
