"""What a checkpoint of any form is and holds, from its metadata alone; figures of its tensors only if asked."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.core_contents import CoreContents, Entry
from checkpoints_tools.forms import Reading, find_form
from checkpoints_tools.models import KINDS, Kind
from checkpoints_tools.stored_layout import StoredLayout, pieces, stored_layout
from checkpoints_tools.tensor_stats import TensorStats, measure
from checkpoints_tools.weights import Weights
from checkpoints_tools.wording import dtype_text, flat, group_of
from megatron_video.config_io import config_to_dict
from megatron_video.errors import UserError
from training.checkpoint_files import CONFIG_FILE, STATE_FILE, WRITTEN, StoredFile, find_fault, read_state_values
from training.config import PretrainConfig
from training.trained_encoders import trained_encoders

# Commands of `ckpt` that leave COMMAND.json beside what they make.
RECORDING = ("average", "convert", "prune", "reshard", "upcycle")
PARTS = ("weights", "averages", "optimizer", "objects")


@dataclass
class Sizes:
    """What some tensors take."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    """Type -> tensors."""

    def add(self, elements: int, size: int, dtype: torch.dtype | None) -> None:
        """Count one more."""
        self.tensors, self.parameters, self.bytes = self.tensors + 1, self.parameters + elements, self.bytes + size
        if dtype is not None:
            self.dtypes[dtype_text(dtype)] = self.dtypes.get(dtype_text(dtype), 0) + 1


@dataclass(frozen=True)
class FileInfo:
    """A file of the checkpoint."""

    name: str
    size: int
    crc32: str | None
    """As it was recorded; None: it was not."""


@dataclass
class TensorInfo:
    """A tensor or object."""

    name: str
    """Stored name in a megatron-core checkpoint, else ours."""
    part: str
    shape: tuple[int, ...]
    dtype: str | None
    parameters: int
    bytes: int
    stored: str
    """Pieces along every axis, or the name in the file."""
    files: list[str]
    """Where that is known."""
    read: Callable[[], Tensor] | None = None
    """The values; None for objects."""
    stats: TensorStats | None = None


@dataclass
class Inspection:
    """All that was found."""

    path: str
    form: str
    kind: str
    """The model's; of several names if config.yaml is of no known model."""
    faults: list[str]
    """What is seen to be wrong at a glance; `verify` looks thoroughly."""
    written: float
    """Unix time."""
    parts: dict[str, Sizes]
    groups: dict[str, Sizes]
    """Module -> its weights."""
    files: list[FileInfo]
    model: dict[str, Any]
    """Sizes."""
    changed: dict[str, Any]
    """Settings of the run that are not the defaults, by dotted name."""
    parallel: dict[str, Any]
    """Layout in the configuration."""
    layout: StoredLayout | None
    """Layout as the files tell it."""
    state: dict[str, Any]
    """Training state, as it is stored."""
    common: dict[str, Any]
    """Values beside the tensors, such as the count of updates."""
    encoders: dict[str, str]
    records: dict[str, dict[str, Any]]
    """Command of `ckpt` that made it -> what it noted of that."""
    tensors: list[TensorInfo]

    @property
    def age(self) -> float:
        """Seconds."""
        return time.time() - self.written

    def chosen(self, parts: Sequence[str], filters: Sequence[str]) -> list[TensorInfo]:
        """The tensors of these parts whose names are like one of the patterns (none: all).

        Raises:
            UserError: there is none.
        """
        found = [
            tensor
            for tensor in self.tensors
            if tensor.part in parts and (not filters or any(fnmatchcase(tensor.name, each) for each in filters))
        ]
        if filters and not found:
            names = ", ".join(tensor.name for tensor in self.tensors[:3])
            raise UserError(f"{self.path}: no tensor is named {' or '.join(filters)}; names are like {names}")
        return found


def add_stats(tensors: Iterable[TensorInfo]) -> None:
    """Read tensors one at a time and measure them.

    Raises:
        UserError: one cannot be read.
    """
    for tensor in tqdm([each for each in tensors if each.read], desc="measure", disable=None):
        if tensor.read is not None:
            tensor.stats = measure(tensor.read())


def inspect(path: Path, reading: Reading | None = None) -> Inspection:
    """Look at one checkpoint; a run folder means nothing here, see run_listing.

    Raises:
        UserError: it is of no known form, or its metadata is damaged.
    """
    reading = reading or Reading()
    if not path.exists():
        raise UserError(f"{path} is not there")
    form = find_form(path, reading.form)
    if form.name == "core":
        return _inspect_core(path, form.title)
    return _inspect_weights(path, form.title, form.open(path, reading))


def _inspect_core(folder: Path, form: str) -> Inspection:
    contents = CoreContents(folder)
    config, fault = _config(folder)
    state, files, state_fault = _state(folder)
    kind = next((kind for kind in KINDS.values() if kind.section in config), None)
    tensors = [_of_entry(contents, entry) for entry in contents.entries.values()]
    return Inspection(
        path=str(folder),
        form=form,
        kind=kind.title if kind else "model that is not known",
        faults=[found for found in dict.fromkeys([find_fault(folder), state_fault, fault]) if found],
        written=float(state.pop(WRITTEN, folder.stat().st_mtime)),
        parts={part: _sizes(tensor for tensor in tensors if tensor.part == part) for part in PARTS},
        groups=_groups(tensors),
        files=_files(folder, files),
        model=dict(config.get(kind.section, {})) if kind else {},
        changed=_changed(config, kind),
        parallel=dict(config.get("parallel") or {}),
        layout=stored_layout(contents),
        state=state,
        common=contents.common,
        encoders=_encoders(folder),
        records=_records(folder),
        tensors=tensors,
    )


def _inspect_weights(path: Path, form: str, weights: Weights) -> Inspection:
    tensors = [_of_template(weights, name, template) for name, template in weights.templates.items()]
    files = _files(path, {})
    newest = max((file.stat().st_mtime for file in _paths(path)), default=path.stat().st_mtime)
    return Inspection(
        path=str(path),
        form=form,
        kind=KINDS[weights.model.kind].title,
        faults=[],
        written=newest,
        parts={part: _sizes(tensor for tensor in tensors if tensor.part == part) for part in PARTS},
        groups=_groups(tensors),
        files=files,
        model=config_to_dict(weights.model.config),
        changed={},
        parallel={},
        layout=None,
        state={},
        common={},
        encoders={},
        records=_records(path),
        tensors=tensors,
    )


def _of_entry(contents: CoreContents, entry: Entry) -> TensorInfo:
    return TensorInfo(
        name=entry.fqn,
        part=entry.part,
        shape=entry.shape,
        dtype=None if entry.dtype is None else dtype_text(entry.dtype),
        parameters=entry.elements,
        bytes=entry.bytes,
        stored=pieces(entry) if entry.dtype is not None else "object",
        files=sorted({chunk.file for chunk in entry.chunks}),
        read=None if entry.dtype is None else lambda: contents.tensor(entry.fqn),
    )


def _of_template(weights: Weights, name: str, template: Tensor) -> TensorInfo:
    file_of: Callable[[str], Path] | None = getattr(weights, "file_of", None)
    return TensorInfo(
        name=name,
        part="weights",
        shape=tuple(template.shape),
        dtype=dtype_text(template.dtype),
        parameters=template.numel(),
        bytes=template.nbytes,
        stored=weights.stored_name(name),
        files=[file_of(name).name] if file_of else [],
        read=lambda: weights.tensor(name),
    )


def _sizes(tensors: Iterable[TensorInfo]) -> Sizes:
    sizes = Sizes()
    for tensor in tensors:
        sizes.add(tensor.parameters, tensor.bytes, None if tensor.dtype is None else getattr(torch, tensor.dtype))
    return sizes


def _groups(tensors: Sequence[TensorInfo]) -> dict[str, Sizes]:
    members: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        if tensor.part == "weights":
            members.setdefault(group_of(tensor.name), []).append(tensor)
    return {group: _sizes(each) for group, each in members.items()}


def _config(folder: Path) -> tuple[dict[str, Any], str | None]:
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, f"{CONFIG_FILE} cannot be read: {str(error).splitlines()[0]}"
    return (values, None) if isinstance(values, dict) else ({}, f"{CONFIG_FILE} holds no mapping")


def _state(folder: Path) -> tuple[dict[str, Any], dict[str, StoredFile], str | None]:
    if not (folder / STATE_FILE).is_file():
        return {}, {}, None  # find_fault says it
    try:
        values, files = read_state_values(folder)
    except ValueError as error:
        return {}, {}, str(error)
    return values, files, None


def _changed(config: Mapping[str, Any], kind: Kind | None) -> dict[str, Any]:
    """Settings that a run would not have without being told."""
    defaults = dict(flat(config_to_dict(PretrainConfig())))
    shown_apart = {"parallel", kind.section if kind else ""}
    stored = {name: value for name, value in flat(config) if name.partition(".")[0] not in shown_apart}
    return {name: value for name, value in stored.items() if name not in defaults or defaults[name] != value}


def _encoders(folder: Path) -> dict[str, str]:
    try:
        return trained_encoders(folder)
    # Only a record of what is elsewhere: a checkpoint can be looked at without it.
    except (UserError, OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for command in RECORDING:
        with contextlib.suppress(OSError, ValueError):
            found[command] = dict(json.loads((folder / f"{command}.json").read_text(encoding="utf-8")))
    return found


def _files(path: Path, recorded: Mapping[str, StoredFile]) -> list[FileInfo]:
    sums = {name: None if file.crc32 is None else f"{file.crc32:08x}" for name, file in recorded.items()}
    names = {str(file.relative_to(path)) if path.is_dir() else file.name: file for file in _paths(path)}
    return [FileInfo(name, file.stat().st_size, sums.get(name)) for name, file in sorted(names.items())]


def _paths(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
