"""Parts of the Video-VAE. Tensors are [B, C, T, H, W], best in channels-last-3d memory, where frames fold for free.

Parameter names are the released checkpoint's; that is why some convolutions sit one level deeper, under `.conv`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_video.vae.config import NORM_GROUPS
from megatron_video.vae.slabs import in_slabs, needs_slabs, slabs

NORM_EPS = 1e-5
# Some convolution kernels index with 32 bits; larger inputs are convolved in pieces along time, with equal results.
MAX_CONV_ELEMENTS = 2**30


def fold_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]; a view in channels-last-3d memory."""
    B, C, T, H, W = x.shape
    return x.transpose(1, 2).reshape(B * T, C, H, W)


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]; a view."""
    BT, C, H, W = x.shape
    return x.reshape(BT // num_frames, num_frames, C, H, W).transpose(1, 2)


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics are those of one frame."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernels for channels-last norms are up to 20 times slower on CPU than two changes of layout.
        normed = super().forward(fold_frames(x).contiguous())
        return unfold_frames(normed.contiguous(memory_format=torch.channels_last), x.shape[2])

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), [B, C, T, 1, 1] in at least fp32: x * scale + shift is the norm of x. Takes little memory."""
        moments = [torch.var_mean(_grouped(frame), dim=(2, 3, 4), correction=0) for frame in x.unbind(dim=2)]
        variance, mean = (torch.stack(parts, dim=2) for parts in zip(*moments, strict=True))
        inverse = torch.rsqrt(variance + self.eps).repeat_interleave(self.num_channels // self.num_groups, dim=1)
        mean = mean.repeat_interleave(self.num_channels // self.num_groups, dim=1)
        scale = inverse * self.weight.to(mean.dtype)[:, None]
        shift = self.bias.to(mean.dtype)[:, None] - mean * scale
        return scale[..., None, None], shift[..., None, None]


def _grouped(frame: Tensor) -> Tensor:
    return frame.unflatten(1, (NORM_GROUPS, -1)).to(torch.promote_types(frame.dtype, torch.float32))


def norm_silu(norm: FrameGroupNorm, x: Tensor) -> Tensor:
    """SiLU(GroupNorm(x))."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class CausalConv3d(nn.Conv3d):
    """3D convolution that sees no later frame: two zero frames in front, zero border of one pixel."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        border = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(0, border, border))

    def forward(self, x: Tensor) -> Tensor:
        history = self.kernel_size[0] - 1
        if x.shape[2] == 1:
            # The frames before an image are zero: only the newest tap of the kernel meets data.
            return self._convolve(x, self.weight[:, :, history:])
        padded = F.pad(x, (0, 0, 0, 0, history, 0)) if history else x
        if padded.numel() < MAX_CONV_ELEMENTS:
            return self._convolve(padded, self.weight)
        return torch.cat([self._convolve(piece, self.weight) for piece in self._pieces(padded)], dim=2)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(x, weight, self.bias, self.stride, self.padding)

    def _pieces(self, padded: Tensor) -> Iterable[Tensor]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        num_outputs = (padded.shape[2] - kernel) // stride + 1
        per_piece = max(1, num_outputs * MAX_CONV_ELEMENTS // (padded.numel() + 1))
        for first in range(0, num_outputs, per_piece):
            last = min(first + per_piece, num_outputs) - 1
            yield padded[:, :, first * stride : last * stride + kernel]


def norm_silu_conv(norm: FrameGroupNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """conv(SiLU(GroupNorm(x))) for a 3x3x3 convolution of stride 1; large inputs in slabs, with equal results."""
    if not needs_slabs(x):
        return conv(norm_silu(norm, x))
    scale, shift = norm.scale_and_shift(x)

    def layer(rows: Tensor) -> Tensor:
        return conv(F.silu(torch.addcmul(shift, rows, scale).to(x.dtype), inplace=True))

    return in_slabs(layer, x)


class CausalConv(nn.Module):
    """A causal convolution stored as `.conv`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResBlock(nn.Module):
    """Two norm-SiLU-convolution layers with a skip; a 1x1x1 convolution in the skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(in_channels)
        self.conv1 = CausalConv(in_channels, out_channels)
        self.norm2 = FrameGroupNorm(out_channels)
        self.conv2 = CausalConv(out_channels, out_channels)
        self.nin_shortcut = CausalConv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h)
        if not needs_slabs(x):
            return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))
        for slab in slabs(x, halo=0):
            rows = slab.rows(x)
            slab.rows(h).add_(rows if self.nin_shortcut is None else self.nin_shortcut(rows))
        return h


class CausalAttention(nn.Module):
    """One head over all T*H*W positions in raster order; a position sees only itself and earlier ones.

    The mask is causal inside a frame too: it belongs to the released weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameGroupNorm(channels)
        self.q = CausalConv(channels, channels, 1)
        self.k = CausalConv(channels, channels, 1)
        self.v = CausalConv(channels, channels, 1)
        self.proj_out = CausalConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (_to_tokens(projection(h)) for projection in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h.transpose(-1, -2).reshape(x.shape)
        return x + self.proj_out(h)


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the deepest width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = CausalAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))
