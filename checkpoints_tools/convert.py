"""Between megatron-core distributed checkpoints and the released Hugging Face names, verified bit for bit."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
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
    names, shapes = _check_names(source), expected_shapes(source.config)
    tensors = _checked_tensors(source, names, shapes, f"convert {source_path.name}")
    writing = output.with_name(output.name + WRITING_SUFFIX)
    shutil.rmtree(writing, ignore_errors=True)
    writing.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, CoreCheckpoint):
        write_released(writing, source.config, tensors, shard_bytes)
    else:
        write_core(writing, source.config, tensors)
    if verify:
        _verify(source, open_checkpoint(writing))
    os.replace(writing, output)
    direction: Literal["core -> released", "released -> core"] = (
        "core -> released" if isinstance(source, CoreCheckpoint) else "released -> core"
    )
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Conversion(str(source_path), str(output), direction, len(names), parameters, verify)


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Released name -> sha256 over dtype, shape and bytes of every tensor."""
    found = {}
    for theirs, own in tqdm(sorted(_own_names(checkpoint).items()), desc="hash", disable=None):
        tensor = checkpoint.tensor(own).contiguous()
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        found[theirs] = digest.hexdigest()
    return found


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Released name -> shape, for every tensor of a model of this shape, from the model itself on the meta device."""
    with one_process() as parallel:
        (model,) = build_dit(config, parallel, torch.float32, device=torch.device("meta"))
    names = released_names(config)
    return {names[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _own_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Released name -> the name under which this checkpoint stores it."""
    names = released_names(checkpoint.config)
    if isinstance(checkpoint, CoreCheckpoint):
        return {theirs: ours for ours, theirs in names.items()}
    return {theirs: theirs for theirs in names.values()}


def _check_names(source: Checkpoint) -> dict[str, str]:
    """Every tensor must be there and known; stored name -> name in the other form.

    Raises:
        UserError: naming up to five missing and unknown tensors.
    """
    own = _own_names(source)
    ours = {theirs: mine for mine, theirs in released_names(source.config).items()}
    missing, unknown = sorted(set(own.values()) - source.names), sorted(source.names - set(own.values()))
    for problem, found in (("lacks", missing), ("has unknown", unknown)):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise UserError(f"{source.folder} {problem} tensors: {', '.join(found[:5])}{more}")
    other: Callable[[str], str] = (lambda t: t) if isinstance(source, CoreCheckpoint) else ours.__getitem__
    return {mine: other(theirs) for theirs, mine in own.items()}


def _checked_tensors(
    source: Checkpoint, names: dict[str, str], shapes: dict[str, tuple[int, ...]], label: str
) -> Iterator[tuple[str, Tensor]]:
    stored_shape = {own: shapes[theirs] for theirs, own in _own_names(source).items()}
    for own, other in tqdm(names.items(), desc=label, disable=None):
        tensor = source.tensor(own)
        if tuple(tensor.shape) != stored_shape[own]:
            raise UserError(
                f"{source.folder}: {own} has shape {list(tensor.shape)}, its config says {list(stored_shape[own])}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source.folder}: {own} holds NaN or infinite values")
        yield other, tensor


def _verify(source: Checkpoint, written: Checkpoint) -> None:
    before, after = digests(source), digests(written)
    different = sorted(name for name in before if before[name] != after.get(name))
    if different:
        raise UserError(f"verification failed: {written.folder} differs in {', '.join(different[:5])}; it was not kept")
