"""Sizes of the Video-VAE, and the arithmetic between frames and latent frames."""

from __future__ import annotations

from megatron_video.config_io import config_dataclass
from megatron_video.errors import UserError

SPATIAL_STRIDE = 16
NORM_GROUPS = 32
NUM_LEVELS = 4
# Every latent channel meets this many channels between the latent and the (un)patchify layers.
BOTTLENECK_EXPANSION = 32


@config_dataclass
class VAEConfig:
    """Widths and chunking of the Video-VAE; the defaults are the released `vae_v2.safetensors`."""

    latent_channels: int = 64
    """Channels of a latent (z). The encoder yields 2z: mean, then log-variance."""
    encoder_channels: int = 32
    """Width unit of the encoder, and the width of its first convolution."""
    encoder_multipliers: tuple[int, ...] = (4, 8, 16, 16)
    """Width of each encoder level, shallow to deep, in units of encoder_channels."""
    decoder_channels: int = 128
    """Width unit of the decoder."""
    decoder_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each decoder level, shallow to deep, in units of decoder_channels."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; a decoder level has one more."""
    chunk_frames: int = 17
    """Frames that are encoded together; chunks share nothing."""
    chunk_latents: int = 3
    """Latent frames of a full chunk, decoded together."""

    def __post_init__(self) -> None:
        """Refuse widths that the norms or the shortcuts cannot divide."""
        if min(self.latent_channels, self.num_res_blocks) < 1:
            raise ValueError(
                f"latent_channels={self.latent_channels} and num_res_blocks={self.num_res_blocks} must be at least 1"
            )
        self._check_widths("encoder", self.encoder_channels, self.encoder_multipliers)
        self._check_widths("decoder", self.decoder_channels, self.decoder_multipliers)
        latents = num_latent_frames(self.chunk_frames, self.chunk_frames)
        if latents != self.chunk_latents:
            raise ValueError(f"chunk_frames={self.chunk_frames} gives {latents} latents, not {self.chunk_latents=}")

    def _check_widths(self, part: str, channels: int, multipliers: tuple[int, ...]) -> None:
        if len(multipliers) != NUM_LEVELS:
            raise ValueError(f"{part}_multipliers={list(multipliers)} must name {NUM_LEVELS} levels")
        widths = [channels, *(channels * multiplier for multiplier in multipliers)]
        if any(width < 1 or width % NORM_GROUPS for width in widths):
            raise ValueError(f"{part} widths {widths} must be multiples of {NORM_GROUPS} (groups of the norms)")
        if widths[-1] % (4 * self.latent_channels):
            raise ValueError(
                f"deepest {part} width {widths[-1]} must be a multiple of 4 * latent_channels = "
                f"{4 * self.latent_channels} (the shortcuts around patchify repeat or average whole channels)"
            )

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of each encoder level, shallow to deep."""
        return tuple(self.encoder_channels * multiplier for multiplier in self.encoder_multipliers)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each decoder level, shallow to deep."""
        return tuple(self.decoder_channels * multiplier for multiplier in self.decoder_multipliers)

    @property
    def bottleneck_channels(self) -> int:
        """Channels between the latent and the (un)patchify layers."""
        return BOTTLENECK_EXPANSION * self.latent_channels


def num_latent_frames(num_frames: int, chunk_frames: int = 17) -> int:
    """Latent frames of a clip: 17 -> 3, 1 -> 1, 204 -> 36.

    Raises:
        UserError: a chunk of `num_frames` would have an odd frame left over in the patchify layer.
    """
    full, rest = divmod(num_frames, chunk_frames)
    if num_frames < 1 or not (_chunk_fits(chunk_frames) or full == 0) or not (_chunk_fits(rest) or rest == 0):
        raise UserError(
            f"{num_frames} frames cannot be encoded: in chunks of {chunk_frames}, the last has {rest or chunk_frames} "
            f"and only 1-4, 9-12 or 17 (modulo 8) fit. Nearest that work: {_nearest(num_frames, chunk_frames)}"
        )
    return full * _chunk_latents(chunk_frames) + (_chunk_latents(rest) if rest else 0)


def _chunk_fits(frames: int) -> bool:
    # Two strides of 2 (rounding up) must leave an odd number: patchify adds one zero frame and halves.
    return frames > 0 and ((frames + 3) // 4) % 2 == 1


def _chunk_latents(frames: int) -> int:
    return ((frames + 3) // 4 + 1) // 2


def _nearest(num_frames: int, chunk_frames: int) -> str:
    def fits(frames: int) -> bool:
        rest = frames % chunk_frames
        return frames > 0 and (rest == 0 or _chunk_fits(rest))

    below = next((n for n in range(num_frames, 0, -1) if fits(n)), None)
    above = next(n for n in range(max(num_frames, 1), max(num_frames, 1) + chunk_frames + 1) if fits(n))
    return f"{above}" if below is None else f"{below} or {above}"


def check_video_size(height: int, width: int) -> None:
    """Refuse what the strides cannot divide.

    Raises:
        UserError: height or width is not a positive multiple of 16.
    """
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % SPATIAL_STRIDE:
            lower = size // SPATIAL_STRIDE * SPATIAL_STRIDE
            near = f"{lower} or {lower + SPATIAL_STRIDE}" if lower > 0 else f"{SPATIAL_STRIDE}"
            raise UserError(f"{name}={size} is not a multiple of {SPATIAL_STRIDE}; nearest that work: {near}")
