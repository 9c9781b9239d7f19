"""Between megatron-core distributed checkpoints and the released Hugging Face names, verified bit for bit."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.core import CoreCheckpoint, write_core
from checkpoints_tools.dit_names import released_names
from checkpoints_tools.released import CONFIG_FILE, ReleasedFolder, write_released
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import one_process

WRITING_SUFFIX = ".partial"
Checkpoint = CoreCheckpoint | ReleasedFolder


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    source: str
    output: str
    direction: Literal["core -> released", "released -> core"]
    tensors: int
    parameters: int
    verified: bool


def open_checkpoint(path: Path) -> Checkpoint:
    """A released folder (it has config.json) or a megatron-core checkpoint.

    Raises:
        UserError: neither.
    """
    return ReleasedFolder(path) if (path / CONFIG_FILE).is_file() else CoreCheckpoint(path)


def convert(source_path: Path, output: Path, *, shard_bytes: int, verify: bool) -> Conversion:
    """Convert to the other form; the output appears under its name only when complete and verified.

    Raises:
        UserError: the output exists; a tensor is missing, unknown, of a wrong shape or not finite.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another --out or remove it")
    source = open_checkpoint(source_path)
    _check_names(source)
    shapes = expected_shapes(source.config)
    read: dict[str, str] = {}
    tensors = _checked_tensors(source, shapes, read)
    writing = output.with_name(output.name + WRITING_SUFFIX)
    shutil.rmtree(writing, ignore_errors=True)
    writing.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, CoreCheckpoint):
        write_released(writing, source.config, tensors, shard_bytes)
    else:
        write_core(writing, source.config, tensors)
    if verify:
        _verify(read, open_checkpoint(writing))
    os.replace(writing, output)
    direction: Literal["core -> released", "released -> core"] = (
        "core -> released" if isinstance(source, CoreCheckpoint) else "released -> core"
    )
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Conversion(str(source_path), str(output), direction, len(shapes), parameters, verify)


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Released name -> sha256 over dtype, shape and bytes of every tensor."""
    found = {}
    for theirs, own in tqdm(sorted(_own_names(checkpoint).items()), desc="hash", disable=None):
        found[theirs] = digest(checkpoint.tensor(own))
    return found


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Released name -> shape, for every tensor of a model of this shape, from the model itself on the meta device."""
    with one_process() as parallel:
        (model,) = build_dit(config, parallel, torch.float32, device=torch.device("meta"))
    names = released_names(config)
    return {names[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def digest(tensor: Tensor) -> str:
    """Sha256 over dtype, shape and bytes."""
    tensor = tensor.contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _own_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Released name -> the name under which this checkpoint stores it."""
    names = released_names(checkpoint.config)
    if isinstance(checkpoint, CoreCheckpoint):
        return {theirs: ours for ours, theirs in names.items()}
    return {theirs: theirs for theirs in names.values()}


def _check_names(source: Checkpoint) -> None:
    """Every tensor must be there and known.

    Raises:
        UserError: naming up to five missing and unknown tensors.
    """
    own = set(_own_names(source).values())
    for problem, found in (("lacks", sorted(own - source.names)), ("has unknown", sorted(source.names - own))):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise UserError(f"{source.folder} {problem} tensors: {', '.join(found[:5])}{more}")


def _checked_tensors(
    source: Checkpoint, shapes: dict[str, tuple[int, ...]], read: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """(name in the other form, tensor) one by one; `read` takes the digest of each by its released name."""
    own_names = _own_names(source)
    to_released = isinstance(source, CoreCheckpoint)
    for ours, theirs in tqdm(released_names(source.config).items(), desc=f"convert {source.folder}", disable=None):
        own = own_names[theirs]
        tensor = source.tensor(own)
        if tuple(tensor.shape) != shapes[theirs]:
            raise UserError(
                f"{source.folder}: {own} has shape {list(tensor.shape)}, its config says {list(shapes[theirs])}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source.folder}: {own} holds NaN or infinite values")
        read[theirs] = digest(tensor)
        yield (theirs if to_released else ours), tensor


def _verify(read: dict[str, str], written: Checkpoint) -> None:
    after = digests(written)
    different = sorted(name for name in read if read[name] != after.get(name))
    if different:
        raise UserError(f"verification failed: {written.folder} differs in {', '.join(different[:5])}; it was not kept")
