"""The whole Video-VAE: chunks of 17 frames coded alone, joined, and mixed at the seams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_video.errors import UserError
from megatron_video.vae.config import VAEConfig, check_video_size, num_latent_frames
from megatron_video.vae.decoder import VideoDecoder
from megatron_video.vae.encoder import VideoEncoder

LOGVAR_RANGE = (-30.0, 20.0)
SEAM_WEIGHT = 0.6


class VideoVAE(nn.Module):
    """Encoder and decoder; `state_dict` has the names of the released checkpoint."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)

    def encode_moments(self, video: Tensor) -> Tensor:
        """Mean and raw log-variance of the latents.

        Memory does not grow with the length (one chunk at a time goes to the weights' device and dtype), and with the
        size of the picture only as three activations of the widest layer do (slabs.py).

        Args:
            video: [B, T, 3, H, W], bytes, or in [-1, 1] in any floating dtype.

        Returns:
            [B, t, 2z, H/16, W/16]: z means, then z log-variances (not clamped).

        Raises:
            UserError: T cannot be cut into chunks, or H or W is not a multiple of 16.
        """
        self._check_video(video)
        chunks = video.transpose(1, 2).split(self.config.chunk_frames, dim=2)
        moments = [self.encoder(self._prepare(chunk)) for chunk in chunks]
        return torch.cat(moments, dim=2).transpose(1, 2)

    def decode(self, latents: Tensor, mix_seams: bool = True) -> Tensor:
        """Frames of latents [B, t, z, h, w] as [B, T, 3, 16h, 16w], about [-1, 1], not clamped.

        Three latents become 17 frames, a last chunk of two becomes 9 and of one 1. `mix_seams` softens the joints
        between chunks, as the released model does.

        Raises:
            UserError: the shape does not fit the configuration.
        """
        if latents.dim() != 5 or latents.shape[2] != self.config.latent_channels:
            raise UserError(
                f"latents of shape {list(latents.shape)}: this VAE decodes [B, t, {self.config.latent_channels}, h, w]"
            )
        chunks = latents.transpose(1, 2).split(self.config.chunk_latents, dim=2)
        frames = torch.cat([self.decoder(self._prepare(chunk)) for chunk in chunks], dim=2).transpose(1, 2)
        return _mix_seams(frames, self.config.chunk_frames) if mix_seams else frames

    def _prepare(self, chunk: Tensor) -> Tensor:
        weight = self.encoder.conv_in.conv.weight
        chunk = chunk.to(weight.device)
        if chunk.dtype == torch.uint8:
            # Scaled in fp32 whatever the dtype of the weights: bf16 has too few digits for bytes.
            chunk = chunk.float() / 127.5 - 1
        return chunk.to(dtype=weight.dtype, memory_format=torch.channels_last_3d)

    def _check_video(self, video: Tensor) -> None:
        if video.dim() != 5 or video.shape[2] != 3:
            raise UserError(f"video of shape {list(video.shape)}: the VAE encodes [B, T, 3, H, W]")
        num_latent_frames(video.shape[1], self.config.chunk_frames)
        check_video_size(*video.shape[3:])


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, t, z, h, w] = mean + standard deviation * noise, from moments [B, t, 2z, h, w].

    The caller owns the noise [B, t, z, h, w], so a draw can be repeated. Computed in the dtype of `moments`.
    """
    mean, logvar = moments.chunk(2, dim=-3)
    deviation = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
    return mean + deviation * noise.to(moments.dtype)


def _mix_seams(frames: Tensor, chunk_frames: int) -> Tensor:
    # In sequence: the frame before the seam is mixed with the already mixed frame after it (0.76 + 0.24 in the end).
    mixed = list(frames.unbind(dim=1))
    for seam in range(chunk_frames, len(mixed), chunk_frames):
        mixed[seam] = torch.lerp(mixed[seam - 1], mixed[seam], SEAM_WEIGHT)
        mixed[seam - 1] = torch.lerp(mixed[seam], mixed[seam - 1], SEAM_WEIGHT)
    return torch.stack(mixed, dim=1)
