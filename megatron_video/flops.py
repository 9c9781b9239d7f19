"""Cost of training samples, and the latent shapes they have."""

from __future__ import annotations

from typing import NamedTuple

from megatron_video.errors import UserError

CHUNK_FRAMES = 17
CHUNK_LATENTS = 3
SPATIAL_STRIDE = 16

# The text length that the paper's Table 3 counts with.
TABLE_3_TEXT_TOKENS = 256


class LatentShape(NamedTuple):
    """Latent frames, rows and columns; with patch size 1 their product is the number of tokens."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of video tokens at patch size 1."""
        return self.frames * self.height * self.width


def training_flops(num_layers: int, hidden: int, tokens: int, text_tokens: int = TABLE_3_TEXT_TOKENS) -> int:
    """FLOPs of forward and backward of one sample, which reproduces Table 3 of arXiv 2502.10248.

    Per layer: linears on video tokens, self-attention, keys and values of the text, cross-attention. Backward counts
    twice the forward; recomputation, embeddings and adaLN are left out, so it yields MFU, not HFU.

    Args:
        num_layers: DiT blocks.
        hidden: model width.
        tokens: video tokens of the sample.
        text_tokens: text keys of the sample.
    """
    # Weights on video tokens, in d^2: qkv 3, output 1, cross query 1, cross output 1, feed-forward 8 = 14, twice that
    # in FLOPs. Attention costs 2 s d for scores and 2 s d for values per token.
    video_linears = 28 * tokens * hidden**2
    self_attention = 4 * tokens**2 * hidden
    text_linears = 4 * text_tokens * hidden**2
    cross_attention = 4 * tokens * text_tokens * hidden
    # Backward computes two products for every one of forward.
    return 3 * num_layers * (video_linears + self_attention + text_linears + cross_attention)


def latent_shape(frames: int, height: int, width: int) -> LatentShape:
    """Latent grid of a clip: 17 frames become 3, an image 1; height and width shrink by 16.

    The released pipeline rounds other numbers down silently (2 to 16 frames become one); here they are refused.

    Raises:
        UserError: frames is neither 1 nor a multiple of 17, or a side is not a multiple of 16.
    """
    if frames != 1 and (frames < 1 or frames % CHUNK_FRAMES):
        lower = frames // CHUNK_FRAMES * CHUNK_FRAMES
        near = f"{max(lower, 1)} or {max(lower, 0) + CHUNK_FRAMES}" if frames > 0 else f"1 or {CHUNK_FRAMES}"
        raise UserError(f"frames={frames} must be 1 or a multiple of {CHUNK_FRAMES}; nearest: {near}")
    latent_frames = 1 if frames == 1 else frames // CHUNK_FRAMES * CHUNK_LATENTS
    return LatentShape(latent_frames, _latent_side("height", height), _latent_side("width", width))


def _latent_side(name: str, pixels: int) -> int:
    if pixels < SPATIAL_STRIDE or pixels % SPATIAL_STRIDE:
        lower = pixels // SPATIAL_STRIDE * SPATIAL_STRIDE
        near = f"{lower} or {lower + SPATIAL_STRIDE}" if lower >= SPATIAL_STRIDE else f"{SPATIAL_STRIDE}"
        raise UserError(f"{name}={pixels} must be a multiple of {SPATIAL_STRIDE}; nearest: {near}")
    return pixels // SPATIAL_STRIDE
