"""Weights that are made from others, tensor by tensor, written as a megatron-core checkpoint with a record of how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.convert import WRITING_SUFFIX
from checkpoints_tools.core import CoreCheckpoint, stream_core
from checkpoints_tools.weights import Weights, digest, is_finite
from megatron_video.errors import UserError
from megatron_video.files import rename_durably


def write_derived(weights: Weights, output: Path, record_name: str, record: Mapping[str, Any], verify: bool) -> None:
    """Write one tensor after the other; the output gets its name when all of it is there and, to verify, read back.

    Args:
        weights: what to write.
        output: folder to create.
        record_name: file in it that says what it was made of.
        record: that file's content, plain values.
        verify: compare what lies on the disk with what was written.

    Raises:
        UserError: a tensor that is not finite, or that the disk does not give back.
    """
    writing = output.with_name(output.name + WRITING_SUFFIX)
    shutil.rmtree(writing, ignore_errors=True)
    writing.parent.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    with tqdm(total=len(weights.templates), desc=f"write {output.name}", disable=None) as bar:

        def next_tensor(name: str) -> Tensor:
            tensor = weights.tensor(name)
            if not is_finite(tensor):
                raise UserError(f"{weights.stored_name(name)}: {tensor.dtype} cannot hold its values")
            digests[name] = digest(tensor)
            bar.update()
            return tensor

        stream_core(writing, weights.model.config, weights.templates, next_tensor)
    if verify:
        _verify(digests, CoreCheckpoint(writing))
    (writing / record_name).write_text(json.dumps(record, indent=1), encoding="utf-8")
    rename_durably(writing, output)


def _verify(digests: Mapping[str, str], written: CoreCheckpoint) -> None:
    names = tqdm(digests, desc="verify", disable=None)
    wrong = [name for name in names if digest(written.tensor(name)) != digests[name]]
    if wrong:
        raise UserError(f"{written.folder} does not hold what was written: {', '.join(wrong[:5])}; it was not kept")
