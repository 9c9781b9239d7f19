"""The weighted sum of several checkpoints' weights, made tensor by tensor when it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.models import KINDS
from checkpoints_tools.weights import Model, Weights, check_tensors, is_finite
from megatron_video.errors import UserError


class MixedWeights:
    """`Weights` that are shares of others, summed in fp32 and rounded once.

    Args:
        sources: of one model, checked by `check_sources`.
        shares: of each.
        templates: shape and type of the result, by our names.
    """

    def __init__(self, sources: Sequence[Weights], shares: Sequence[float], templates: Mapping[str, Tensor]) -> None:
        self._sources, self._shares, self._templates = sources, shares, templates

    @property
    def origin(self) -> Path:
        """Of the first."""
        return self._sources[0].origin

    @property
    def model(self) -> Model:
        """What all of them are."""
        return self._sources[0].model

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Our name -> shape and type."""
        return self._templates

    def stored_name(self, name: str) -> str:
        """As the first names it."""
        return self._sources[0].stored_name(name)

    def tensor(self, name: str) -> Tensor:
        """The sum of one tensor.

        Raises:
            UserError: a source whose tensor is not finite.
        """
        # bf16 would round after every checkpoint.
        total = torch.zeros(self._templates[name].shape, dtype=torch.float32)
        for source, share in zip(self._sources, self._shares, strict=True):
            found = source.tensor(name)
            if not is_finite(found):
                raise UserError(f"{source.origin}: {source.stored_name(name)} holds NaN or infinite values")
            total.add_(found.float(), alpha=share)
        return total.to(self._templates[name].dtype)


def check_sources(sources: Sequence[Weights]) -> None:
    """Only different checkpoints of one model can be mixed.

    Raises:
        UserError: fewer than two, one given twice, other models or tensors: naming what differs, with both values.
    """
    if len(sources) < 2:
        raise UserError("one checkpoint has no mean: give two or more, e.g. RUN/checkpoints/step_*")
    places = [source.origin.resolve() for source in sources]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is given twice (a run folder is its newest checkpoint); give it one weight")
    first, *others = sources
    check_tensors(first)
    for other in others:
        wrong = _differences(other.model, first.model)
        if wrong:
            raise UserError(f"{other.origin} and {first.origin} hold other models: {'; '.join(wrong)}")
        check_tensors(other)


def _differences(theirs: Model, ours: Model) -> list[str]:
    if theirs.kind != ours.kind:
        return [f"{theirs.kind} and {ours.kind}"]
    there, here = dataclasses.asdict(theirs.config), dataclasses.asdict(ours.config)
    # Fine-tuned with another dropout, it is still the same model.
    free = KINDS[ours.kind].fields.unkept if theirs.shapes == ours.shapes else ()
    wrong = [name for name in here if there[name] != here[name] and name not in free]
    return [f"{name} {there[name]} and {here[name]}" for name in wrong]
