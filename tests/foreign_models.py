"""Plain torch modules with the parameter names of our models, as other people's trainers hold them, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import tiny_models
import torch
import yaml
from torch import Tensor, nn

from checkpoints_tools.models import KINDS
from checkpoints_tools.weights import Model, Weights
from megatron_video.config_io import config_to_dict

# A bias of three values, which two ranks cannot halve.
MODEL = replace(tiny_models.MODEL, out_channels=3)


def tiny_dit() -> Model:
    """Names and shapes of the DiT of MODEL."""
    return KINDS["dit"].build(MODEL)


def write_config(folder: Path) -> Path:
    """`folder`/config.yaml with the sizes of `tiny_dit`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": config_to_dict(MODEL)}), encoding="utf-8")
    return path


def released_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of `tiny_dit` by their released names."""
    generator = torch.Generator().manual_seed(seed)
    model = tiny_dit()
    return {
        theirs: torch.randn(model.shapes[ours], generator=generator).to(dtype)
        for ours, theirs in sorted(model.released.items())
    }


class NamedModule(nn.Module):
    """A tree of modules whose parameters have the given names; its output is a number that depends on all of them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        own = {name: weight for name, weight in weights.items() if "." not in name}
        for name, weight in own.items():
            self.register_parameter(name, nn.Parameter(weight.clone()))
        for child in dict.fromkeys(name.split(".")[0] for name in weights.keys() - own.keys()):
            inside = {n.removeprefix(f"{child}."): w for n, w in weights.items() if n.startswith(f"{child}.")}
            self.add_module(child, _leaf(inside))

    def forward(self, x: Tensor) -> Tensor:
        """A scalar, of a scalar that is multiplied in."""
        own = sum((p * x).square().mean() for p in self.parameters(recurse=False))
        return torch.as_tensor(own) + sum(child(x) for child in self.children())


class _Linear(nn.Linear):
    """A linear with NamedModule's forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        total = (self.weight * x).square().mean()
        return total if self.bias is None else total + (self.bias * x).square().mean()


def _leaf(weights: Mapping[str, Tensor]) -> nn.Module:
    weight = weights.get("weight")
    if weight is None or weight.dim() != 2 or weights.keys() - {"weight", "bias"}:
        return NamedModule(weights)
    linear = _Linear(weight.shape[1], weight.shape[0], bias="bias" in weights)
    linear.load_state_dict(dict(weights))
    return linear


def assert_holds(weights: Weights, expected: Mapping[str, Tensor]) -> None:
    """The weights by our names are bit for bit those expected by released ones, templates included."""
    assert weights.templates.keys() == weights.model.shapes.keys()
    assert len(expected) == len(weights.model.released)
    for ours, theirs in weights.model.released.items():
        found = weights.tensor(ours)
        assert (found.dtype, found.shape) == (weights.templates[ours].dtype, weights.templates[ours].shape), ours
        assert found.dtype == expected[theirs].dtype
        assert torch.equal(found, expected[theirs]), theirs


def read_all(weights: Weights) -> None:
    """Read every tensor once."""
    for name in weights.templates:
        weights.tensor(name)
