"""Are weights of any form complete, finite, and those of the model that is wanted?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.core_contents import CoreContents, Entry
from checkpoints_tools.forms import Reading, find_form
from checkpoints_tools.models import KINDS, read_model
from checkpoints_tools.released import read_config
from checkpoints_tools.verify import UNFINISHED, Verdict, unfinished_fault, verify, verify_sizes
from checkpoints_tools.verify_core import core_faults, extra_files
from checkpoints_tools.verify_files import file_faults
from checkpoints_tools.weights import Model, Weights, is_finite
from checkpoints_tools.wording import Tell, shape_text
from megatron_video.config_io import config_to_dict, load_config
from megatron_video.errors import UserError
from training.checkpoint_files import read_state_values
from training.checkpoint_folders import find_checkpoint
from training.config import PRESET_DIR, PretrainConfig


@dataclass(frozen=True)
class Wanted:
    """The model that should be there."""

    source: str
    """Where its sizes were read."""
    kind: str
    sizes: Mapping[str, Any]


def wanted_of_config(source: str) -> Wanted:
    """The model of a configuration of pretraining (a file or a preset), or of a released config.json.

    Raises:
        UserError: no such file, or not valid.
    """
    if source.endswith(".json"):
        return _wanted(source, read_config(Path(source)))
    config = load_config(PretrainConfig, source, preset_dir=PRESET_DIR)
    return Wanted(source, "dit", config_to_dict(config.model))


def wanted_like(path: Path, reading: Reading) -> Wanted:
    """The model of another checkpoint.

    Raises:
        UserError: it cannot be opened.
    """
    form = find_form(path, reading.form)
    model = read_model(find_checkpoint(path)) if form.name == "core" else form.open(path, reading).model
    return _wanted(str(path), model)


def _wanted(source: str, model: Model) -> Wanted:
    return Wanted(source, model.kind, config_to_dict(model.config))


def verify_core(folder: Path, wanted: Wanted | None, quick: bool, threads: int, tell: Tell) -> Verdict:
    """Look at a megatron-core checkpoint: files, metadata, configuration, values.

    Args:
        folder: of one checkpoint.
        wanted: the model it should hold; None: whatever its configuration says.
        quick: leave out all that reads whole files.
        threads: files that are read at the same time.
        tell: gets lines about the progress.
    """
    if folder.suffix in UNFINISHED:
        return Verdict(str(folder), faults=[unfinished_fault(folder)])
    verdict = verify_sizes(folder) if quick else verify(folder, threads, tell)
    model, contents, faults = core_faults(folder)
    verdict.faults += [fault for fault in faults if fault not in verdict.faults]
    if model is not None and wanted is not None:
        verdict.faults += _model_faults(model, wanted)
    # Where the list of files is damaged, that is named already.
    with contextlib.suppress(ValueError, OSError):
        verdict.faults += extra_files(folder, read_state_values(folder)[1])
    if contents is not None and not quick:
        _read_all(verdict, _core_pieces(contents), len(contents.entries))
    return verdict


def verify_weights(path: Path, reading: Reading, wanted: Wanted | None, quick: bool) -> Verdict:
    """Look at weights of any other form.

    Raises:
        UserError: they are of no known form, or cannot be opened for another reason than damage of safetensors files.
    """
    form = find_form(path, reading.form)
    verdict = Verdict(str(path), faults=file_faults(path) if form.name == "released" else [])
    try:
        weights = form.open(path, reading)
    except UserError as error:
        if not verdict.faults:
            raise
        verdict.faults.append(f"it cannot be opened: {error}")
        return verdict
    verdict.faults += _complete(weights)
    verdict.faults += _model_faults(weights.model, wanted) if wanted else []
    if not quick:
        pieces = ((weights.stored_name(name), partial(_whole, weights, name)) for name in weights.templates)
        _read_all(verdict, pieces, len(weights.templates))
    return verdict


def _whole(weights: Weights, name: str) -> list[Tensor]:
    return [weights.tensor(name)]


def _complete(weights: Weights) -> Iterator[str]:
    found, shapes = weights.templates, weights.model.shapes
    yield from (f"{weights.stored_name(name)} is missing" for name in shapes if name not in found)
    yield from (f"{weights.stored_name(name)} is unknown to the model" for name in found if name not in shapes)
    for name, shape in shapes.items():
        if name in found and tuple(found[name].shape) != tuple(shape):
            stored = shape_text(found[name].shape)
            yield f"{weights.stored_name(name)} has shape {stored}, its config says {shape_text(shape)}"


def _model_faults(model: Model, wanted: Wanted) -> list[str]:
    if model.kind != wanted.kind:
        return [f"it is a {KINDS[model.kind].title}; {wanted.source} describes a {KINDS[wanted.kind].title}"]
    kind = KINDS[model.kind]
    sizes = config_to_dict(model.config)
    # Sizes without effect on the weights' values, which not every form keeps.
    compared = [name for name in sizes if name not in kind.fields.unkept]
    return [
        f"{kind.section}.{name} is {sizes[name]}; {wanted.source} says {wanted.sizes.get(name)}"
        for name in compared
        if sizes[name] != wanted.sizes.get(name)
    ]


def _core_pieces(contents: CoreContents) -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    for entry in contents.entries.values():
        if entry.dtype is not None:
            yield entry.fqn, partial(_chunks, contents, entry)


def _chunks(contents: CoreContents, entry: Entry) -> Iterator[Tensor]:
    return (contents.chunk(entry.fqn, chunk) for chunk in entry.chunks)


def _read_all(verdict: Verdict, pieces: Iterable[tuple[str, Callable[[], Iterable[Tensor]]]], count: int) -> None:
    """Read everything, a piece in memory at a time, and name what is not finite or cannot be read."""
    for name, read in tqdm(pieces, total=count, desc=f"read {Path(verdict.folder).name}", disable=None):
        nan = inf = values = 0
        try:
            for piece in read():
                values += piece.numel()
                if not is_finite(piece):
                    nan, inf = nan + int(torch.isnan(piece).sum()), inf + int(torch.isinf(piece).sum())
        except UserError as error:
            verdict.faults.append(str(error))
            continue
        if nan or inf:
            verdict.faults.append(f"{name} holds {nan} NaN and {inf} infinite values among {values}")
        verdict.tensors, verdict.values = verdict.tensors + 1, verdict.values + values
