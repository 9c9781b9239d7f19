"""Two checkpoints of one model, in whatever forms and layouts, tensor by tensor: which differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.core_contents import PREFIXES
from checkpoints_tools.forms import Reading, find_form, open_weights
from checkpoints_tools.models import KINDS
from checkpoints_tools.tensor_stats import Difference, compare, relative
from checkpoints_tools.weights import Weights
from checkpoints_tools.wording import flat, group_of
from megatron_video.config_io import config_to_dict
from megatron_video.errors import UserError
from training.checkpoint import read_config, read_state

Verdict = Literal["equal", "different", "shape", "only first", "only second"]


@dataclass(frozen=True)
class Options:
    """What is compared, and when it counts as the same."""

    tolerance: float | None = None
    """Largest relative difference (L2) of a tensor; None: bits must be equal."""
    filters: tuple[str, ...] = ()
    """Patterns of our names; none: all tensors."""
    averages: bool = False
    """Compare the moving averages of the sides that hold any, instead of their trained weights."""
    optimizer: bool = False
    """Compare the optimizer's tensors too, and the training state."""


@dataclass(frozen=True)
class TensorDiff:
    """One tensor."""

    name: str
    verdict: Verdict
    first: Tensor | None
    """Shape and dtype, on the meta device; None: it is not there."""
    second: Tensor | None
    difference: Difference | None = None
    """Of tensors of one shape."""

    def within(self, tolerance: float | None) -> bool:
        """Whether it is the same, as far as is asked."""
        if self.difference is None or tolerance is None:
            return self.verdict == "equal"
        return self.difference.relative <= tolerance


@dataclass(frozen=True)
class Value:
    """A value that is not the same; None: not there."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class GroupDiff:
    """The tensors of one part of the model."""

    group: str
    tensors: int
    differing: int
    relative: float
    max_abs: float


@dataclass
class Diff:
    """All of it."""

    first: dict[str, str]
    """Path, form, and which tensors of it."""
    second: dict[str, str]
    options: Options
    tensors: list[TensorDiff] = field(default_factory=list)
    config: list[Value] = field(default_factory=list)
    """Settings that differ, the model's and the run's; they do not count: forms store more or fewer of them."""
    state: list[Value] = field(default_factory=list)
    """Training state that differs; it counts."""

    @property
    def different(self) -> list[TensorDiff]:
        """All that are not equal, the largest relative difference first."""
        found = [tensor for tensor in self.tensors if tensor.verdict != "equal"]
        return sorted(found, key=lambda t: (t.difference is not None, -t.difference.relative if t.difference else 0))

    @property
    def same(self) -> bool:
        """Equal, or within the tolerance."""
        return not self.state and all(tensor.within(self.options.tolerance) for tensor in self.tensors)

    def groups(self) -> list[GroupDiff]:
        """The differences by part of the model."""
        names: dict[str, list[TensorDiff]] = {}
        for tensor in self.tensors:
            names.setdefault(_group_of(tensor.name), []).append(tensor)
        return [_group(name, members) for name, members in names.items()]


def diff(first: Path, second: Path, options: Options, reading: Reading | None = None) -> Diff:
    """Compare two checkpoints, two tensors in memory at a time.

    Args:
        first: any form that forms.open_weights recognises.
        second: another of the same kind of model.
        options: what of them.
        reading: how to read forms of other programs; its form is the second one's.

    Raises:
        UserError: models of different kinds; no averages or optimizer state where they are asked for; a damaged tensor.
    """
    reading = reading or Reading()
    ours = _Side(first, Reading(**{**vars(reading), "form": None}), options)
    theirs = _Side(second, reading, options)
    _check(ours, theirs, options)
    found = Diff(ours.describe(), theirs.describe(), options)
    names = _chosen([*ours.templates, *(name for name in theirs.templates if name not in ours.templates)], options)
    found.tensors = [_compare(name, ours, theirs) for name in tqdm(names, desc="diff", disable=None)]
    configs = ours.config(), theirs.config()
    # Only a run has the sections of a run.
    shared = [{name: values for name, values in each.items() if all(name in c for c in configs)} for each in configs]
    found.config = list(_values(*shared))
    if options.optimizer:
        found.state = list(_values(ours.state(), theirs.state()))
    return found


class _Side:
    """The tensors of one checkpoint that are compared."""

    def __init__(self, path: Path, reading: Reading, options: Options) -> None:
        self.weights: Weights = open_weights(path, reading)
        self.form = find_form(path, reading.form).title
        self.core = self.weights if isinstance(self.weights, CoreCheckpoint) else None
        self.averaged = bool(options.averages and self.core and self.core.contents.of_part("averages"))
        if self.averaged:
            self.weights = CoreCheckpoint(path, averaged=True)
        self.optimizer = self.core.contents.of_part("optimizer") if self.core and options.optimizer else {}
        self.templates: Mapping[str, Tensor] = {
            **self.weights.templates,
            **{fqn: entry.template for fqn, entry in self.optimizer.items()},
        }

    def tensor(self, name: str) -> Tensor:
        if name in self.optimizer:
            assert self.core is not None
            return self.core.contents.tensor(name)
        return self.weights.tensor(name)

    def describe(self) -> dict[str, str]:
        what = "moving averages" if self.averaged else "weights"
        return {"path": str(self.weights.origin), "form": self.form, "tensors": what}

    def config(self) -> dict[str, Any]:
        """The model's sizes, and all settings of a run where they are stored."""
        rest = read_config(self.core.folder) if self.core else {}
        return rest | {KINDS[self.weights.model.kind].section: config_to_dict(self.weights.model.config)}

    def state(self) -> dict[str, Any]:
        assert self.core is not None
        return {**asdict(read_state(self.core.folder)), **self.core.contents.common}


def _check(first: _Side, second: _Side, options: Options) -> None:
    kinds = [KINDS[side.weights.model.kind].title for side in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{first.weights.origin} holds a {kinds[0]}, {second.weights.origin} a {kinds[1]}")
    if options.averages and not (first.averaged or second.averaged):
        raise UserError(f"neither {first.weights.origin} nor {second.weights.origin} holds averages; leave --ema out")
    for side in (first, second) if options.optimizer else ():
        if not side.optimizer:
            raise UserError(f"{side.weights.origin} holds no optimizer state; leave --optimizer out")


def _chosen(names: Sequence[str], options: Options) -> list[str]:
    if not options.filters:
        return list(names)
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in options.filters)]
    if not found:
        raise UserError(f"no tensor is named {' or '.join(options.filters)}; names are like {', '.join(names[:3])}")
    return found


def _compare(name: str, first: _Side, second: _Side) -> TensorDiff:
    ours, theirs = first.templates.get(name), second.templates.get(name)
    if ours is None or theirs is None:
        return TensorDiff(name, "only second" if ours is None else "only first", ours, theirs)
    if ours.shape != theirs.shape:
        return TensorDiff(name, "shape", ours, theirs)
    found = compare(first.tensor(name), second.tensor(name))
    equal = not found.differing and ours.dtype == theirs.dtype
    return TensorDiff(name, "equal" if equal else "different", ours, theirs, found)


def _values(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Value]:
    ours, theirs = dict(flat(first)), dict(flat(second))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            yield Value(name, ours.get(name), theirs.get(name))


def _group_of(label: str) -> str:
    of_optimizer = (role for prefix, (_, role) in PREFIXES.items() if label.startswith(prefix))
    return next((f"optimizer {role}" for role in of_optimizer), None) or group_of(label)


def _group(name: str, members: Sequence[TensorDiff]) -> GroupDiff:
    found = [tensor.difference for tensor in members if tensor.difference is not None]
    gap, norm = (torch.tensor([getattr(d, key) for d in found]).double().norm().item() for key in ("gap", "norm"))
    differing = sum(tensor.verdict != "equal" for tensor in members)
    return GroupDiff(name, len(members), differing, relative(gap, norm), max((d.max_abs for d in found), default=0.0))
