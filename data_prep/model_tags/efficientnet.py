"""EfficientNet-B3 with the parameter names of timm, in which the known watermark detector is published.

Not timm itself: it needs torchvision, whose wheel on PyPI does not load beside a CPU build of torch. Sizes: Tan and Le,
arXiv 1905.11946, B3 (width 1.2, depth 1.4); checked against timm 1.0.31.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

HEAD_CHANNELS = 1536
_STEM_CHANNELS = 40
_SQUEEZE = 4


class _Stage(NamedTuple):
    blocks: int
    channels: int
    kernel: int
    stride: int
    expansion: int


_STAGES = (
    _Stage(2, 24, 3, 1, 1),
    _Stage(3, 32, 3, 2, 6),
    _Stage(3, 48, 5, 2, 6),
    _Stage(5, 96, 3, 2, 6),
    _Stage(5, 136, 5, 1, 6),
    _Stage(6, 232, 5, 2, 6),
    _Stage(2, 384, 3, 1, 6),
)


class EfficientNetB3(nn.Module):
    """float [B, 3, H, W] -> what `classifier` makes of the pooled [B, 1536]."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.conv_stem = _conv(3, _STEM_CHANNELS, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.blocks = nn.Sequential(*_stages())
        self.conv_head = _conv(_STAGES[-1].channels, HEAD_CHANNELS, 1)
        self.bn2 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.classifier = classifier

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Apply the network."""
        x = self.blocks(F.silu(self.bn1(self.conv_stem(pixels))))
        x = F.silu(self.bn2(self.conv_head(x)))
        result: torch.Tensor = self.classifier(x.mean(dim=(2, 3)))
        return result


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.silu(self.conv_reduce(x.mean(dim=(2, 3), keepdim=True)))
        return x * torch.sigmoid(self.conv_expand(pooled))


class _Separable(nn.Module):
    """The block without expansion, which stands in the first stage only."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = _conv(channels, channels, kernel, stride, groups=channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.se = _SqueezeExcite(channels, channels // _SQUEEZE)
        self.conv_pw = _conv(channels, out, 1)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv_pw(self.se(F.silu(self.bn1(self.conv_dw(x))))))
        return x + y if self.shortcut else y


class _InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.conv_pw = _conv(channels, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv_dw = _conv(inner, inner, kernel, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        # The squeeze is a share of the block's input, not of its expanded channels.
        self.se = _SqueezeExcite(inner, channels // _SQUEEZE)
        self.conv_pwl = _conv(inner, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.bn2(self.conv_dw(F.silu(self.bn1(self.conv_pw(x))))))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + y if self.shortcut else y


def _stages() -> list[nn.Sequential]:
    channels, stages = _STEM_CHANNELS, []
    for stage in _STAGES:
        blocks: list[nn.Module] = []
        for number in range(stage.blocks):
            # Only a stage's first block shrinks the picture.
            stride = 1 if number else stage.stride
            blocks.append(_block(channels, stage, stride))
            channels = stage.channels
        stages.append(nn.Sequential(*blocks))
    return stages


def _block(channels: int, stage: _Stage, stride: int) -> nn.Module:
    if stage.expansion == 1:
        return _Separable(channels, stage.channels, stage.kernel, stride)
    return _InvertedResidual(channels, stage.channels, stage.kernel, stride, stage.expansion)


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
