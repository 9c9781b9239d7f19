"""Heads over a CLIP embedding: aesthetic (LAION improved predictor) and NSFW (LAION, two layouts)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_prep.model_tags.base import TagBatch
from data_prep.model_tags.clip import ClipEncoder
from megatron_video.errors import UserError

State = dict[str, torch.Tensor]

# Modules of `layers` in order: L linear, R ReLU, D dropout (nothing at inference, but it takes a number).
_AESTHETIC_LAYERS = "LDLDLDLL"
_NSFW_H14_LAYERS = "LRDLRDLRDLRDLRDLL"
_NSFW_L14_LINEARS = 4


class AestheticTag:
    """Mean over the frames of sac+logos+ava1-l14-linearMSE; about 1 to 10, higher is better."""

    column: ClassVar[str] = "aesthetic"

    def __init__(self, encoder: ClipEncoder, head: Path) -> None:
        self._encoder = encoder
        self._head = _loaded(_layers(load_state(head), _AESTHETIC_LAYERS, head), load_state(head), head, encoder)

    @torch.inference_mode()
    def score(self, batch: TagBatch) -> list[float]:
        """One number a clip."""
        return [self._head(clip).mean().item() for clip in batch.image_embeddings(self._encoder)]


class NsfwTag:
    """Largest over the frames: one such frame makes the clip one (the paper does not say how it joins them)."""

    column: ClassVar[str] = "nsfw"

    def __init__(self, encoder: ClipEncoder, head: Path) -> None:
        state = load_state(head)
        network = _Normalized(state, head) if "linear_1.weight" in state else _layers(state, _NSFW_H14_LAYERS, head)
        self._encoder = encoder
        self._head = _loaded(network, state, head, encoder)

    @torch.inference_mode()
    def score(self, batch: TagBatch) -> list[float]:
        """One number a clip."""
        return [self._head(clip).max().item() for clip in batch.image_embeddings(self._encoder)]


class _Layers(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.width = next(m.in_features for m in layers if isinstance(m, nn.Linear))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(embedding)
        return result


class _Normalized(nn.Module):
    """The ViT-L/14 NSFW head: standardised embedding, three hidden layers, sigmoid."""

    def __init__(self, state: State, path: Path) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.empty_like(_tensor(state, "norm.mean", path)))
        self.norm.register_buffer("variance", torch.empty_like(_tensor(state, "norm.variance", path)))
        for number in range(1, _NSFW_L14_LINEARS + 1):
            self.add_module(f"linear_{number}", _linear(state, f"linear_{number}", path))
        self.width = self.get_submodule("linear_1").in_features

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        x = (embedding - self.norm.mean) / self.norm.variance.sqrt()  # type: ignore[operator]
        for number in range(1, _NSFW_L14_LINEARS):
            x = torch.relu(self.get_submodule(f"linear_{number}")(x))
        return torch.sigmoid(self.get_submodule(f"linear_{_NSFW_L14_LINEARS}")(x))


def load_state(path: Path) -> State:
    """Tensors of a .safetensors file or of a pickled state dict; nothing else is unpickled.

    Raises:
        UserError: not such a file.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as a state dict: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors")
    return state


def load_strictly(network: nn.Module, state: State, path: Path) -> None:
    """Fill all of a network, and with all of a file.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:400]
        raise UserError(f"{path}: another layout than {type(network).__name__.strip('_')}: {details}") from None


def _loaded(network: _Layers | _Normalized, state: State, path: Path, encoder: ClipEncoder) -> nn.Module:
    load_strictly(network, state, path)
    if network.width != encoder.width:
        raise UserError(
            f"{path}: the head takes embeddings of {network.width}, {encoder.folder} gives {encoder.width}; "
            "name the CLIP model that the head was trained on"
        )
    return network.float().eval()


def _layers(state: State, kinds: str, path: Path) -> _Layers:
    modules: list[nn.Module] = []
    for number, kind in enumerate(kinds):
        modules.append(_linear(state, f"layers.{number}", path) if kind == "L" else _UNTRAINED[kind]())
    return _Layers(nn.Sequential(*modules))


_UNTRAINED: dict[str, type[nn.Module]] = {"R": nn.ReLU, "D": nn.Dropout}


def _linear(state: State, name: str, path: Path) -> nn.Linear:
    # The sizes come from the file, so that a head for another CLIP width loads too.
    out_features, in_features = _tensor(state, f"{name}.weight", path).shape
    return nn.Linear(in_features, out_features)


def _tensor(state: State, name: str, path: Path) -> torch.Tensor:
    if name not in state:
        raise UserError(f"{path}: no {name} in it, so it is no head of the expected layout; it has {sorted(state)[:6]}")
    return state[name]
