"""The models whose weights are moved, one row of KINDS each: their sizes, their tensors, the names of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.clip_config import ClipConfig
from checkpoints_tools.dit_names import released_names
from checkpoints_tools.released_fields import CLIP_FIELDS, DIT_FIELDS, LLM_FIELDS, VAE_FIELDS, ReleasedFields
from checkpoints_tools.safetensors_files import GIGABYTE
from checkpoints_tools.weights import Model
from megatron_video.config_io import build_config, config_to_dict
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import one_process
from megatron_video.text.clip import OTHER_PARTS, PREFIX, build_clip
from megatron_video.text.step_llm import StepLLM, StepLLMConfig
from megatron_video.vae import VAEConfig, VideoVAE
from training.checkpoint import MODEL_SECTION, OTHER_SECTIONS, read_config


@dataclass(frozen=True)
class Kind:
    """What must be known of a model to move its weights."""

    title: str
    """For messages."""
    section: str
    """Its key in the config.yaml of a megatron-core checkpoint."""
    config: type
    """Dataclass of its sizes; the defaults are the released ones."""
    stem: str
    """Of its released weight files: STEM.safetensors, or STEM-00001-of-00006.safetensors and so on with an index."""
    shard_gigabytes: float | None
    """Largest of these files, in GB, as released; a single tensor may be larger. None: the public code opens one."""
    build: Callable[[Any], Model]
    """Sizes -> tensors."""
    fields: ReleasedFields
    """Of its released config.json."""
    signature: str
    """Released name, after the prefix, of a tensor that no other kind has."""
    prefix: str = ""
    """Before all names in the released file, where the rest are other heads; a file without it is read too."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of released names, after the prefix, that are known and not part of the model: they are left out."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Field of the sizes that says whether tensors are there -> released name, after the prefix, of one of them."""


def _dit(config: DiTConfig) -> Model:
    with one_process() as parallel:
        (model,) = build_dit(config, parallel, torch.float32, device=torch.device("meta"))
    return Model("dit", config, released_names(config), _shapes(model))


# The modules of the other three have the released names (CLIP's after the prefix).


def _vae(config: VAEConfig) -> Model:
    with torch.device("meta"):
        shapes = _shapes(VideoVAE(config))
    return Model("vae", config, {name: name for name in shapes}, shapes)


def _clip(config: ClipConfig) -> Model:
    values = {name: value for name, value in config_to_dict(config).items() if name in CLIP_FIELDS.shared}
    with torch.device("meta"):
        shapes = _shapes(build_clip(values, "the CLIP sizes", with_pooler=config.pooler))
    return Model("clip", config, {name: PREFIX + name for name in shapes}, shapes)


def _llm(config: StepLLMConfig) -> Model:
    with torch.device("meta"):
        shapes = _shapes(StepLLM(config))
    return Model("llm", config, {name: name for name in shapes}, shapes)


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


KINDS = {
    "dit": Kind(
        title="video DiT",
        section=MODEL_SECTION,
        config=DiTConfig,
        stem="diffusion_pytorch_model",
        shard_gigabytes=10.0,
        build=_dit,
        fields=DIT_FIELDS,
        signature="adaln_single.linear.weight",
    ),
    "vae": Kind(
        title=OTHER_SECTIONS["vae"],
        section="vae",
        config=VAEConfig,
        stem="vae_v2",
        shard_gigabytes=None,
        build=_vae,
        fields=VAE_FIELDS,
        signature="decoder.conv_unpatchify.conv.conv.weight",
    ),
    "clip": Kind(
        title=OTHER_SECTIONS["clip"],
        section="clip",
        config=ClipConfig,
        stem="model",
        shard_gigabytes=5.0,
        build=_clip,
        fields=CLIP_FIELDS,
        signature="embeddings.token_type_embeddings.weight",
        prefix=PREFIX,
        other_parts=OTHER_PARTS,
        optional={"pooler": "pooler.dense.weight"},
    ),
    "llm": Kind(
        title=OTHER_SECTIONS["step_llm"],
        section="step_llm",
        config=StepLLMConfig,
        stem="model",
        shard_gigabytes=5.0,
        build=_llm,
        fields=LLM_FIELDS,
        signature="tok_embeddings.word_embeddings.weight",
    ),
}


def shard_limit(kind: Kind, given: int | None) -> int | None:
    """Bytes of the largest released file; None: there is one file.

    Raises:
        UserError: `given`, and this model's file must not be cut.
    """
    if kind.shard_gigabytes is None:
        if given is not None:
            raise UserError(f"--max-shard-gb: a {kind.title} is one file, {kind.stem}.safetensors; leave it out")
        return None
    return given or int(kind.shard_gigabytes * GIGABYTE)


def read_model(checkpoint: Path) -> Model:
    """What a megatron-core checkpoint holds, by its config.yaml.

    Raises:
        UserError: the sizes of no model, or of several.
    """
    values = read_config(checkpoint)
    found = [kind for kind in KINDS.values() if kind.section in values]
    if len(found) != 1:
        what = " and ".join(kind.section for kind in found) or f"none of {', '.join(k.section for k in KINDS.values())}"
        raise UserError(f"{checkpoint} holds {what} in its config.yaml, where one model's sizes should be")
    (kind,) = found
    return kind.build(build_config(kind.config, values[kind.section], origin=str(checkpoint)))
