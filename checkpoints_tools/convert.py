"""Between megatron-core distributed checkpoints and the released Hugging Face names, verified bit for bit."""

from __future__ import annotations

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
from checkpoints_tools.forms import open_weights
from checkpoints_tools.released import write_released
from checkpoints_tools.weights import Weights, check_tensors, digest
from megatron_video.errors import UserError

WRITING_SUFFIX = ".partial"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    source: str
    output: str
    direction: Literal["core -> released", "released -> core"]
    tensors: int
    parameters: int
    verified: bool


def convert(source_path: Path, output: Path, *, shard_bytes: int, verify: bool) -> Conversion:
    """Convert to the other form; the output appears under its name only when complete and verified.

    Raises:
        UserError: the output exists; a tensor is missing, unknown, of a wrong shape or not finite.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another --out or remove it")
    source = open_weights(source_path)
    check_tensors(source)
    read: dict[str, str] = {}
    tensors = _checked_tensors(source, read)
    writing = output.with_name(output.name + WRITING_SUFFIX)
    shutil.rmtree(writing, ignore_errors=True)
    writing.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, CoreCheckpoint):
        write_released(writing, source.model, tensors, shard_bytes)
    else:
        write_core(writing, source.model.config, tensors)
    if verify:
        _verify(read, open_weights(writing))
    os.replace(writing, output)
    direction: Literal["core -> released", "released -> core"] = (
        "core -> released" if isinstance(source, CoreCheckpoint) else "released -> core"
    )
    parameters = sum(torch.Size(shape).numel() for shape in source.model.shapes.values())
    return Conversion(str(source_path), str(output), direction, len(source.model.shapes), parameters, verify)


def digests(weights: Weights) -> dict[str, str]:
    """Our name -> sha256 over dtype, shape and bytes of every tensor."""
    return {name: digest(weights.tensor(name)) for name in tqdm(weights.templates, desc="hash", disable=None)}


def _checked_tensors(source: Weights, read: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) one by one; `read` takes the digest of each."""
    for name in tqdm(source.model.shapes, desc=f"convert {source.origin}", disable=None):
        tensor = source.tensor(name)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source.origin}: {source.stored_name(name)} holds NaN or infinite values")
        read[name] = digest(tensor)
        yield name, tensor


def _verify(read: dict[str, str], written: Weights) -> None:
    after = digests(written)
    different = sorted(name for name in read if read[name] != after.get(name))
    if different:
        raise UserError(f"verification failed: {written.origin} differs in {', '.join(different[:5])}; it was not kept")
