"""Low-rank adapters merged into weights: W + scale * up @ down, in fp32, rounded once, when a tensor is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.foreign import ROOTS, unwrapped
from checkpoints_tools.lora_files import Adapter, LowRank
from checkpoints_tools.weights import Model, Weights
from checkpoints_tools.wording import weighted_path
from megatron_video.errors import UserError

# What PEFT puts before the names of the model it wraps.
_PEFT_ROOTS = ("base_model", *ROOTS)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter, and how much of it is merged."""

    path: Path
    weight: float = 1.0

    @staticmethod
    def parse(text: str) -> AdapterSource:
        """Read PATH or PATH=WEIGHT.

        Raises:
            UserError: a weight that is 0 or not finite.
        """
        path, weight = weighted_path(text)
        if weight is None:
            return AdapterSource(path)
        if weight == 0 or not math.isfinite(weight):
            raise UserError(f"--lora {text}: the weight {weight:g} must be a number other than 0")
        return AdapterSource(path, weight)


@dataclass(frozen=True)
class _Part:
    """One adapter's share in one tensor."""

    adapter: Adapter
    change: LowRank
    weight: float


def merged(
    base: Weights, adapters: Sequence[AdapterSource], trust_pickle: bool = False, tell: Callable[[str], None] = print
) -> MergedWeights:
    """`base` with adapters merged into it; nothing but their names is read yet.

    Args:
        base: of any form.
        adapters: in the order in which they are added.
        trust_pickle: run whatever an adapter_model.bin asks for.
        tell: gets a line about each adapter.

    Raises:
        UserError: an adapter that is damaged, or of another kind, model or shape.
    """
    parts: dict[str, list[_Part]] = {}
    for source in adapters:
        adapter = Adapter(source.path, trust_pickle)
        for name, change in _targets(base, adapter).items():
            parts.setdefault(name, []).append(_Part(adapter, change, source.weight))
        scales = sorted({change.scale * source.weight for change in adapter.changes})
        told = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        tell(f"{source.path}: merged into {len(adapter.changes)} of {len(base.templates)} tensors, scale {told}")
    for name, found in parts.items():
        if any(part.change.magnitude for part in found) and (len(found) > 1 or found[0].weight != 1):
            raise UserError(
                f"{found[0].adapter.path}: DoRA sets the lengths of the rows of {base.stored_name(name)}, so it can be "
                "neither weighted nor merged with another adapter; merge it alone"
            )
    return MergedWeights(base, parts)


class MergedWeights:
    """Weights that adapters were merged into; made by `merged`."""

    def __init__(self, base: Weights, parts: Mapping[str, list[_Part]]) -> None:
        self._base, self._parts = base, parts

    @property
    def origin(self) -> Path:
        """The base's."""
        return self._base.origin

    @property
    def model(self) -> Model:
        """The base's."""
        return self._base.model

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """The base's."""
        return self._base.templates

    def stored_name(self, name: str) -> str:
        """The base's."""
        return self._base.stored_name(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the base's dtype."""
        weight = self._base.tensor(name)
        if name not in self._parts:
            return weight
        total = weight.float()
        for part in self._parts[name]:
            delta = part.adapter.delta(part.change, tuple(weight.shape))
            # The base's own tensor may be shared; the first sum makes another one.
            total = total + delta.mul_(part.change.scale * part.weight)
            lengths = part.adapter.magnitude(part.change)
            if lengths is not None:
                total = _with_lengths(total, lengths)
        return total.to(weight.dtype)


def _with_lengths(weight: Tensor, lengths: Tensor) -> Tensor:
    """DoRA (arXiv 2402.09353, equation 5): rows in the direction of `weight`, of these lengths."""
    rows = weight.flatten(1)
    return (rows * (lengths / torch.linalg.vector_norm(rows, dim=1))[:, None]).view(weight.shape)


def _targets(base: Weights, adapter: Adapter) -> dict[str, LowRank]:
    """Our name of every weight that the adapter changes."""
    ours = {theirs: name for name, theirs in base.model.released.items()} | {name: name for name in base.model.shapes}
    found: dict[str, LowRank] = {}
    unknown = []
    for change in adapter.changes:
        name = _target(change.module, ours)
        if name is None:
            unknown.append(change.module)
        elif name in found:
            raise UserError(f"{adapter.path} changes {name} twice, as {found[name].module} and as {change.module}")
        else:
            _refuse_other_shape(adapter, change, name, base)
            found[name] = change
    if unknown:
        known = sorted({theirs.split(".")[-2] for theirs in base.model.released.values() if theirs.endswith(".weight")})
        raise UserError(
            f"{adapter.path} changes modules that this model has not: {', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}; the model's are called {', '.join(known)}"
        )
    return found


def _target(module: str, ours: Mapping[str, str]) -> str | None:
    """Our name of a module's weight; before the module's own name there may only be what wraps models."""
    parts = f"{unwrapped(module)}.weight".split(".")
    ends: Iterable[int] = range(len(parts))
    start = next((i for i in ends if ".".join(parts[i:]) in ours), None)
    if start is None or not set(parts[:start]) <= set(_PEFT_ROOTS):
        return None
    return ours[".".join(parts[start:])]


def _refuse_other_shape(adapter: Adapter, change: LowRank, name: str, base: Weights) -> None:
    shape = base.model.shapes[name]
    if (change.outputs, change.inputs) != (shape[0], torch.Size(shape[1:]).numel()):
        raise UserError(
            f"{adapter.path}: the adapter of {change.module} is for a weight of {change.outputs} x {change.inputs}, "
            f"{base.stored_name(name)} has the shape {list(shape)}"
        )
