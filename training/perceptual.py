"""LPIPS 0.1 (Zhang et al. 2018, VGG16) as a loss, from local files in their public layouts.

The `lpips` package, last released in 2021, downloads its backbone; here both files are named by the user.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_video.contact_sheet import evenly_spaced
from megatron_video.errors import UserError
from training.vae_config import PerceptualConfig

# VGG16: widths of the convolutions of each block, with a 2x2 maximum between the blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Per-channel shift and scale of pictures in [-1, 1], that is ImageNet's mean and deviation.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Perceptual distance of frames; no parameter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_vgg16_layers())
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(1, block[-1], 1, 1)) for block in BLOCKS)
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [N] of pictures [N, 3, H, W] in [-1, 1]; H and W at least 16."""
        total = x.new_zeros(len(x))
        for features_x, features_y, head in zip(self._blocks(x), self._blocks(y), self.heads, strict=True):
            error = (_unit(features_x) - _unit(features_y)).square()
            total = total + (error * head).sum(dim=1).mean(dim=(1, 2))
        return total

    def _blocks(self, x: Tensor) -> list[Tensor]:
        """Activations at the end of each block, before the maximum."""
        x = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


def video_lpips(lpips: LPIPS, decoded: Tensor, original: Tensor, max_frames: int | None) -> Tensor:
    """Mean LPIPS over the frames of [B, T, 3, H, W], or over `max_frames` of each clip, evenly spaced."""
    chosen = evenly_spaced(original.shape[1], max_frames or original.shape[1])
    return lpips(decoded[:, chosen].flatten(0, 1), original[:, chosen].flatten(0, 1)).mean()


def load_lpips(config: PerceptualConfig, device: torch.device) -> LPIPS:
    """Read the two weight files.

    Raises:
        UserError: a file is missing or unreadable, or its keys or shapes are others.
    """
    assert config.vgg is not None
    assert config.heads is not None
    lpips = LPIPS()
    vgg = _read(config.vgg)
    wanted = {f"features.{name}": weight for name, weight in lpips.features.state_dict().items()}
    wanted_heads = {f"lin{number}.model.1.weight": head for number, head in enumerate(lpips.heads)}
    for path, found, names in ((config.vgg, vgg, wanted), (config.heads, _read(config.heads), wanted_heads)):
        for name, weight in names.items():
            _copy(path, found, name, weight)
    return lpips.to(device)


def _vgg16_layers() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for number, block in enumerate(BLOCKS):
        layers += [nn.MaxPool2d(2)] if number else []
        for width in block:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


def _unit(features: Tensor) -> Tensor:
    # The root of the sum has no gradient at zero, where every channel of a position is off.
    return features / (features.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)


def _read(path: str) -> dict[str, Tensor]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return weights
    except Exception as error:
        raise UserError(f"perceptual weights {path} cannot be read: {error}") from None


@torch.no_grad()
def _copy(path: str, found: dict[str, Tensor], name: str, weight: Tensor) -> None:
    shape = list(found[name].shape) if name in found else None
    if shape != list(weight.shape):
        raise UserError(f"perceptual weights {path}: {name} must be {list(weight.shape)}, is {shape or 'missing'}")
    weight.copy_(found[name])
