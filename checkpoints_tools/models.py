"""The models whose weights are moved, one row of KINDS each: their sizes, their tensors, the names of their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints_tools.dit_names import released_names
from checkpoints_tools.weights import Model
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import one_process


@dataclass(frozen=True)
class Kind:
    """What must be known of a model to move its weights."""

    title: str
    """For messages."""
    section: str
    """Its key in the config.yaml of a megatron-core checkpoint."""
    config: type
    """Dataclass of its sizes."""
    stem: str
    """Of its released weight files: STEM.safetensors, or STEM-00001-of-00006.safetensors and so on with an index."""
    build: Callable[[Any], Model]
    """Sizes -> tensors."""


def _dit(config: DiTConfig) -> Model:
    with one_process() as parallel:
        (model,) = build_dit(config, parallel, torch.float32, device=torch.device("meta"))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Model("dit", config, released_names(config), shapes)


KINDS = {
    "dit": Kind("video DiT", "model", DiTConfig, "diffusion_pytorch_model", _dit),
}
