"""Latents of generated samples, kept beside the videos: what preference pairs are made of."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.files import appearing
from megatron_video.shard_schema import to_stored
from megatron_video.text import TextStates


class SampledLatent(NamedTuple):
    """One sample before the Video-VAE decoded it, with the states of its prompt."""

    latent: Tensor
    """[t, z, h, w] bf16."""
    llm: Tensor
    """[n, d_llm] bf16."""
    clip: Tensor
    """[L_clip, d_clip] bf16."""


def latent_file(folder: Path, index: int) -> Path:
    """Where the latent of a sample is."""
    return folder / f"{index:05d}.latent.safetensors"


def write_latent(path: Path, latent: Tensor, states: TextStates) -> None:
    """Store the latent [t, z, h, w] and the text of one sample; the file appears whole.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    tensors = {"latent": to_stored(latent), "llm": to_stored(states.llm), "clip": to_stored(states.clip)}
    try:
        with appearing(path) as temporary:
            save_file(tensors, temporary)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}; give the same command again when it can") from None


def read_latent(path: Path) -> SampledLatent:
    """What `write_latent` stored.

    Raises:
        UserError: not there, damaged, or with numbers that are not finite.
    """
    try:
        tensors = load_file(path)
        found = SampledLatent(tensors["latent"], tensors["llm"], tensors["clip"])
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; generate with --latents") from None
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it and its video, and generate again") from None
    if not torch.isfinite(found.latent).all():
        raise UserError(f"{path}: holds numbers that are not finite; delete it and its video, and generate again")
    return found
