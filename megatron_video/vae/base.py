"""The 4x8x8 VAE that the Video-VAE grows out of: the same backbone without the dual-path modules (paper 4.1).

The paper trains it first and then inserts the dual-path modules behind the middle blocks. Its latent channels are not
published; 16 are those of the released first version, which has the same strides.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_video.config_io import build_config, config_to_dict
from megatron_video.errors import UserError
from megatron_video.vae.autoencoder import VideoVAE
from megatron_video.vae.checkpoint import check_weights, write_files
from megatron_video.vae.config import VAEConfig, check_video_size
from megatron_video.vae.decoder import WARMUP_FRAMES, VideoDecoder
from megatron_video.vae.encoder import VideoEncoder
from megatron_video.vae.primitives import CausalConv, norm_silu, norm_silu_conv

BASE_CONFIG_FILE = "base_config.json"
BASE_WEIGHTS_FILE = "base_model.safetensors"
SPATIAL_STRIDE = 8
# By the names of the modules; what is in neither list is the backbone.
DUAL_PATH = ("encoder.conv_patchify", "encoder.conv_out", "decoder.conv_in", "decoder.conv_unpatchify")
MIDDLE = ("encoder.mid", "encoder.norm_out", "decoder.mid")


class BaseEncoder(VideoEncoder):
    """[B, 3, T, H, W] -> moments [B, 2z, (T+3)/4, H/8, W/8]."""

    def __init__(self, config: VAEConfig, latent_channels: int) -> None:
        super().__init__(config)
        del self.conv_patchify
        self.conv_out = CausalConv(config.encoder_widths[-1], 2 * latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        h = self.conv_in(video)
        for level in self.down:
            h = level(h)
        return self.conv_out(norm_silu(self.norm_out, self.mid(h)))


class BaseDecoder(VideoDecoder):
    """Latents [B, z, t, h, w] -> frames [B, 3, 4t - 3, 8h, 8w], not clamped."""

    def __init__(self, config: VAEConfig, latent_channels: int) -> None:
        super().__init__(config)
        del self.conv_unpatchify
        self.conv_in = CausalConv(latent_channels, config.decoder_widths[-1])

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return norm_silu_conv(self.norm_out, self.conv_out, h)[:, :, WARMUP_FRAMES:]


class BaseVideoVAE(VideoVAE):
    """The VAE of the base stages; names and shapes of the backbone are the whole VAE's."""

    def __init__(self, config: VAEConfig, latent_channels: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.latent_channels = latent_channels
        self.encoder = BaseEncoder(config, latent_channels)
        self.decoder = BaseDecoder(config, latent_channels)

    def decode(self, latents: Tensor, mix_seams: bool = False) -> Tensor:
        """Frames of latents [B, t, z, h, w] as [B, T, 3, 8h, 8w]; five latents become 17 frames.

        Seams are left as they are: their mixing belongs to the released model.
        """
        chunks = latents.transpose(1, 2).split(_num_latents(self.config.chunk_frames), dim=2)
        return torch.cat([self.decoder(self._prepare(chunk)) for chunk in chunks], dim=2).transpose(1, 2)

    def _check_video(self, video: Tensor) -> None:
        # As strict as the whole VAE: what trains the base must train what grows out of it.
        check_video_size(*video.shape[3:])


def latent_shape(vae: VideoVAE, video: tuple[int, ...]) -> tuple[int, ...]:
    """Shape [B, t, z, h, w] of the latents of pixels [B, T, 3, H, W]."""
    B, T, _, H, W = video
    full, rest = divmod(T, vae.config.chunk_frames)
    times = sum(_num_latents(frames) for frames in [vae.config.chunk_frames] * full + [rest] * (rest > 0))
    if isinstance(vae, BaseVideoVAE):
        return B, times, vae.latent_channels, H // SPATIAL_STRIDE, W // SPATIAL_STRIDE
    times = full * vae.config.chunk_latents + ((_num_latents(rest) + 1) // 2 if rest else 0)
    return B, times, vae.config.latent_channels, H // (2 * SPATIAL_STRIDE), W // (2 * SPATIAL_STRIDE)


def part_of(name: str) -> str:
    """Part of the VAE that a parameter belongs to: dual_path, middle or backbone."""
    parts = {"dual_path": DUAL_PATH, "middle": MIDDLE}
    return next((part for part, prefixes in parts.items() if name.startswith(prefixes)), "backbone")


def grow(weights: dict[str, Tensor], vae: VideoVAE) -> None:
    """Give the whole VAE the backbone and the middle blocks of a base VAE; its dual-path modules stay as they are.

    Raises:
        UserError: the base has other widths.
    """
    own = vae.state_dict()
    carried = {name: weight for name, weight in weights.items() if part_of(name) != "dual_path"}
    kept = {name: weight for name, weight in own.items() if part_of(name) == "dual_path"}
    check_weights(vae, {**kept, **carried}, "the base VAE")
    vae.load_state_dict({**kept, **carried})


def save_base(vae: BaseVideoVAE, folder: Path) -> None:
    """Write `base_config.json` and `base_model.safetensors`; each file appears whole or not at all."""
    values = {"latent_channels": vae.latent_channels, "model": config_to_dict(vae.config)}
    write_files(folder, vae, BASE_WEIGHTS_FILE, values, BASE_CONFIG_FILE)


def load_base(folder: Path) -> BaseVideoVAE:
    """Read what `save_base` wrote, on the CPU in fp32.

    Raises:
        UserError: a file is missing, or the weights do not fit the configuration.
    """
    try:
        values = json.loads((folder / BASE_CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / BASE_WEIGHTS_FILE)
        channels, model = int(values["latent_channels"]), values["model"]
    except Exception as error:
        raise UserError(f"{folder} holds no base VAE that can be read: {error}") from None
    vae = BaseVideoVAE(build_config(VAEConfig, model, str(folder / BASE_CONFIG_FILE)), channels)
    check_weights(vae, weights, str(folder / BASE_WEIGHTS_FILE))
    vae.load_state_dict(weights)
    return vae


def _num_latents(frames: int) -> int:
    return (frames + 3) // 4
