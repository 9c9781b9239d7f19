"""Weights of a Video-VAE that is trained from scratch; the reference has none to copy."""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_video.vae.autoencoder import VideoVAE
from megatron_video.vae.primitives import CausalAttention, ResBlock

# A posterior that starts narrow lets the decoder see what the encoder says before the KL term widens it.
INITIAL_LOGVAR = -6.0
OUTPUT_GAIN = 0.3


@torch.no_grad()
def initialise(vae: VideoVAE, seed: int) -> None:
    """Set every weight in place, as a function of `seed` alone.

    Convolutions keep the variance of their input (normal, 1 / fan-in); every residual block and the attention start
    as the identity (zero last convolution), so at first the shortcuts carry the signal; norms are 1 and 0; the
    posterior starts with a standard deviation of exp(-3), and the frames start grey.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            deviation = 1 / math.sqrt(module.weight[0].numel())
            values = torch.randn(module.weight.shape, generator=generator) * deviation
            module.weight.copy_(values)
            nn.init.zeros_(module.bias) if module.bias is not None else None
        elif isinstance(module, nn.GroupNorm):
            module.reset_parameters()
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.conv.weight)
        elif isinstance(module, CausalAttention):
            nn.init.zeros_(module.proj_out.conv.weight)
    moments = vae.encoder.conv_out.conv
    # The second half are log-variances, in a base VAE too, whose latents have another number of channels.
    latent_channels = moments.out_channels // 2
    moments.weight[latent_channels:] *= 0.1
    assert moments.bias is not None
    moments.bias[latent_channels:] = INITIAL_LOGVAR
    vae.decoder.conv_out.weight *= OUTPUT_GAIN
