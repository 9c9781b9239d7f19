"""Video-VAE files: a folder with `config.json` and weights, the released folder, or its `.safetensors` file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_video.config_io import build_config, config_to_dict
from megatron_video.errors import UserError
from megatron_video.files import appearing, write_atomically
from megatron_video.vae.autoencoder import VideoVAE
from megatron_video.vae.config import VAEConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RELEASED_FILE = "vae_v2.safetensors"
SHOWN = 5


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VideoVAE:
    """Read a Video-VAE for inference.

    Args:
        path: a folder written by `save_vae` or with the released file, or a `.safetensors` file. Without
            `config.json` in the folder, and for a file, the widths are the released ones.
        device: where the weights go.
        dtype: of the weights, and so of the computation.

    Raises:
        UserError: a file is missing or unreadable, or keys or shapes do not fit the configuration.
    """
    path = Path(path)
    weights_path = _weights_path(path)
    config = read_vae_config(path)
    weights = _read_weights(weights_path, device)
    with torch.device("meta"):
        vae = VideoVAE(config)
    check_weights(vae, weights, str(weights_path))
    vae.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return to_channels_last(vae).eval().requires_grad_(False)


def read_vae_config(path: Path) -> VAEConfig:
    """Sizes of the Video-VAE that `load_vae` would read from `path`.

    Raises:
        UserError: config.json is missing where it is needed, or unreadable.
    """
    # The released folder has none.
    bare = not path.is_dir() or (_weights_path(path).name == RELEASED_FILE and not (path / CONFIG_FILE).exists())
    return VAEConfig() if bare else _read_config(path / CONFIG_FILE)


def _weights_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    released = path / RELEASED_FILE
    return released if released.is_file() and not (path / WEIGHTS_FILE).exists() else path / WEIGHTS_FILE


def save_vae(vae: VideoVAE, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` (fp32) to `folder`; each file appears whole or not at all."""
    write_files(Path(folder), vae, WEIGHTS_FILE, config_to_dict(vae.config), CONFIG_FILE)


def write_files(folder: Path, model: nn.Module, weights_file: str, values: dict[str, Any], config_file: str) -> None:
    """Write a model's weights as fp32, then `values` as JSON; each file appears whole or not at all.

    Raises:
        UserError: the weights cannot be written, as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    try:
        with appearing(folder / weights_file) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{folder / weights_file} cannot be written: {error}") from None
    write_atomically(folder / config_file, (json.dumps(values, indent=1) + "\n").encode())


def to_channels_last(vae: VideoVAE) -> VideoVAE:
    """Lay the weights out in memory as the activations are, in place; saves a copy in every convolution."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return vae


def check_weights(module: torch.nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Compare names and shapes with those of `module`.

    Raises:
        UserError: names the first keys that are missing, unknown, or of another shape.
    """
    expected = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    problems = [
        _list("missing keys", sorted(expected.keys() - found.keys())),
        _list("unknown keys", sorted(found.keys() - expected.keys())),
        _list(
            "wrong shapes",
            [
                f"{name} {list(found[name])}, not {list(expected[name])}"
                for name in sorted(expected.keys() & found.keys())
                if expected[name] != found[name]
            ],
        ),
    ]
    if any(problems):
        raise UserError(
            f"{origin} does not fit the Video-VAE configuration: {'; '.join(filter(None, problems))}. "
            f"A bare .safetensors file must have the released widths; other widths need a folder with {CONFIG_FILE}"
        )


def _list(title: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{title}: {', '.join(names[:SHOWN])}{more}" if names else ""


def _read_config(path: Path) -> VAEConfig:
    if not path.is_file():
        raise UserError(f"{path} is missing: a Video-VAE folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return build_config(VAEConfig, values, origin=str(path))


def _read_weights(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"no Video-VAE weights at {path}")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
