"""Video-VAE decoder: the latents of one chunk to its frames."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_video.vae.config import BOTTLENECK_EXPANSION, VAEConfig
from megatron_video.vae.primitives import (
    CausalConv,
    CausalConv3d,
    FrameGroupNorm,
    MiddleBlock,
    ResBlock,
    norm_silu_conv,
)
from megatron_video.vae.resample import Unpatchify, Upsample2D, Upsample3D

UPSAMPLERS: tuple[type[nn.Module] | None, ...] = (None, Upsample2D, Upsample3D, Upsample3D)
# The two temporal doublings turn 4n+1 frames into 4 * (4n+1) / 4 + 3: what precedes the first real frame is dropped.
WARMUP_FRAMES = 3


class DecoderLevel(nn.Module):
    """Residual blocks of one width, then the change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, upsampler: type[nn.Module] | None) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResBlock(channels, out_channels) for channels in inputs)
        self.upsample = upsampler(out_channels) if upsampler else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class VideoDecoder(nn.Module):
    """Latents [B, z, t, h, w] -> frames [B, 3, T, 16h, 16w], not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.decoder_widths
        inputs = (*widths[1:], widths[-1])
        self.conv_in = CausalConv(config.latent_channels, config.bottleneck_channels)
        self.conv_unpatchify = Unpatchify(config.bottleneck_channels, widths[-1])
        self.mid = MiddleBlock(widths[-1])
        # Index 0 is the finest level, as in the checkpoint; they run from the last to the first.
        self.up = nn.ModuleList(
            DecoderLevel(in_channels, width, config.num_res_blocks + 1, upsampler)
            for in_channels, width, upsampler in zip(inputs, widths, UPSAMPLERS, strict=True)
        )
        self.norm_out = FrameGroupNorm(widths[0])
        self.conv_out = CausalConv3d(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.conv_in(latents) + latents.repeat_interleave(BOTTLENECK_EXPANSION, dim=1)
        h = self.mid(self.conv_unpatchify(h))
        for level in reversed(self.up):
            h = level(h)
        return norm_silu_conv(self.norm_out, self.conv_out, h)[:, :, WARMUP_FRAMES:]
