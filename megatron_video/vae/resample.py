"""Changes of resolution: strided and nearest-neighbour layers, and the pixel (un)shuffles with their shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_video.vae.primitives import (
    CausalConv,
    FrameGroupNorm,
    fold_frames,
    norm_silu,
    norm_silu_conv,
    unfold_frames,
)
from megatron_video.vae.slabs import in_slabs, needs_slabs, slabs


def unshuffle(x: Tensor, factor: int = 2) -> Tensor:
    """Blocks of factor^3 positions become channels, ordered (C, ft, fh, fw); factor-1 zero frames go in front."""
    x = F.pad(x, (0, 0, 0, 0, factor - 1, 0))
    B, C, T, H, W = x.shape
    x = x.reshape(B, C, T // factor, factor, H // factor, factor, W // factor, factor)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, C * factor**3, T // factor, H // factor, W // factor)


def shuffle(x: Tensor, factor: int = 2) -> Tensor:
    """The inverse of `unshuffle`: channels (C, ft, fh, fw) become positions, the first factor-1 frames go."""
    B, C, T, H, W = x.shape
    x = x.reshape(B, C // factor**3, factor, factor, factor, T, H, W)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, C // factor**3, T * factor, H * factor, W * factor)[:, :, factor - 1 :]


def group_mean(x: Tensor, out_channels: int) -> Tensor:
    """Mean over runs of neighbouring channels: [B, C, ...] -> [B, out_channels, ...]."""
    return x.unflatten(1, (out_channels, -1)).mean(dim=2)


class Patchify(nn.Module):
    """Half the resolution in time, height and width: convolution + unshuffle, plus the averaged unshuffle of x."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = CausalConv(in_channels, out_channels // 8)

    def forward(self, x: Tensor) -> Tensor:
        return unshuffle(self.conv(x)) + group_mean(unshuffle(x), self.out_channels)


class Unpatchify(nn.Module):
    """Twice the resolution in time, height and width: convolution + shuffle, plus the shuffle of repeated channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.repeats = 8 * out_channels // in_channels
        self.conv = CausalConv(in_channels, 8 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(self.conv(x) + x.repeat_interleave(self.repeats, dim=1))


class Downsample2D(nn.Module):
    """Half the height and width, frame by frame; the border is at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if not needs_slabs(x):
            return self._downsample(x)
        # An output row needs its two rows and the one below: no result has to be thrown away.
        parts = [self._downsample(x[..., slab.first : slab.bottom, :]) for slab in slabs(x, step=2)]
        return torch.cat(parts, dim=3).contiguous(memory_format=torch.channels_last_3d)

    def _downsample(self, x: Tensor) -> Tensor:
        return unfold_frames(self.conv(F.pad(fold_frames(x), (0, 1, 0, 1))), x.shape[2])


class Downsample3D(nn.Module):
    """Half the frames (rounded up), height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Twice the height and width by repetition, then a convolution, frame by frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return in_slabs(self._upsample, x, scale=2, enlarged=4) if needs_slabs(x, enlarged=4) else self._upsample(x)

    def _upsample(self, x: Tensor) -> Tensor:
        enlarged = F.interpolate(fold_frames(x), scale_factor=2.0, mode="nearest")
        return unfold_frames(self.conv(enlarged), x.shape[2])


class _UpsampleConvs(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(channels, channels)
        self.norm1 = FrameGroupNorm(channels)
        self.conv2 = CausalConv(channels, channels)
        self.norm2 = FrameGroupNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """From the input of the upsampling [B, C, T, H, W] to [B, C, 2T, 2H, 2W]."""
        if needs_slabs(x, enlarged=8):
            return self._in_slabs(x)
        x = _enlarge(x)
        h = self.norm2(self.conv2(norm_silu(self.norm1, self.conv1(x))))
        return F.silu(h + x) + x

    def _in_slabs(self, x: Tensor) -> Tensor:
        h = in_slabs(lambda rows: self.conv1(_enlarge(rows)), x, scale=2, enlarged=8)
        h = norm_silu_conv(self.norm1, self.conv2, h)
        scale, shift = self.norm2.scale_and_shift(h)
        for slab in slabs(x, enlarged=8, halo=0):
            enlarged, rows = _enlarge(slab.rows(x)), slab.rows(h, 2)
            normed = torch.addcmul(shift, rows, scale).to(x.dtype)
            rows.copy_(F.silu(normed + enlarged) + enlarged)
        return h


class Upsample3D(nn.Module):
    """Twice the frames, height and width by repetition, then two convolutions, each before its norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3d = _UpsampleConvs(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


def _enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
