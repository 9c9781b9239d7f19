"""Video-VAE encoder: one chunk of frames to the mean and log-variance of its latents."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_video.vae.config import VAEConfig
from megatron_video.vae.primitives import CausalConv, FrameGroupNorm, MiddleBlock, ResBlock, norm_silu
from megatron_video.vae.resample import Downsample2D, Downsample3D, Patchify, group_mean

DOWNSAMPLERS: tuple[type[nn.Module] | None, ...] = (Downsample2D, Downsample3D, Downsample3D, None)


class EncoderLevel(nn.Module):
    """Residual blocks of one width, then the change of resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, downsampler: type[nn.Module] | None
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResBlock(channels, out_channels) for channels in inputs)
        self.downsample = downsampler(out_channels) if downsampler else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class VideoEncoder(nn.Module):
    """[B, 3, T, H, W] in [-1, 1] -> moments [B, 2z, t, H/16, W/16]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.encoder_widths
        inputs = (config.encoder_channels, *widths[:-1])
        self.moment_channels = 2 * config.latent_channels
        self.conv_in = CausalConv(3, config.encoder_channels)
        self.down = nn.ModuleList(
            EncoderLevel(in_channels, width, config.num_res_blocks, downsampler)
            for in_channels, width, downsampler in zip(inputs, widths, DOWNSAMPLERS, strict=True)
        )
        self.mid = MiddleBlock(widths[-1])
        self.norm_out = FrameGroupNorm(widths[-1])
        self.conv_patchify = Patchify(widths[-1], config.bottleneck_channels)
        self.conv_out = CausalConv(config.bottleneck_channels, self.moment_channels)

    def forward(self, video: Tensor) -> Tensor:
        h = self.conv_in(video)
        for level in self.down:
            h = level(h)
        h = self.conv_patchify(norm_silu(self.norm_out, self.mid(h)))
        return self.conv_out(h) + group_mean(h, self.moment_channels)
