"""FLOPs of the encoders, from their sizes: the Video-VAE's encoder, Step-LLM and HunyuanCLIP."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_video.flops import CHUNK_FRAMES
from megatron_video.text.clip import DEFAULT_MAX_LENGTH
from megatron_video.text.step_llm import StepLLMConfig
from megatron_video.vae.config import VAEConfig

_BF16 = 2
# Tensors that a norm with its activation reads and writes: statistics, then values in and out.
_NORM_PASSES = 3
# Sum of two tensors.
_SUM_PASSES = 3


@dataclass(frozen=True)
class ClipSize:
    """Sizes of a BERT encoder; the defaults are the released HunyuanCLIP."""

    layers: int = 24
    hidden_size: int = 1024
    ffn_size: int = 4096
    tokens: int = DEFAULT_MAX_LENGTH
    """Slots, all of which are computed."""


@dataclass(frozen=True)
class EncoderWork:
    """Of one sample."""

    convolution_flops: float = 0.0
    gemm_flops: float = 0.0
    attention_flops: float = 0.0
    """With the masked half of scores, which plain kernels compute too."""
    moved_bytes: float = 0.0
    """By norms, activations and sums, in bf16."""

    def __add__(self, other: EncoderWork) -> EncoderWork:
        return EncoderWork(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def __mul__(self, count: float) -> EncoderWork:
        return EncoderWork(**{name: value * count for name, value in vars(self).items()})

    @property
    def flops(self) -> float:
        """All together."""
        return self.convolution_flops + self.gemm_flops + self.attention_flops


def vae_work(vae: VAEConfig, frames: int, height: int, width: int) -> EncoderWork:
    """To encode a clip; each chunk of 17 frames alone."""
    chunks, rest = divmod(frames, CHUNK_FRAMES)
    work = _chunk(vae, CHUNK_FRAMES, height, width) * chunks
    return work + _chunk(vae, rest, height, width) if rest else work


def llm_work(llm: StepLLMConfig, tokens: int) -> EncoderWork:
    """To encode a caption of so many tokens with Step-LLM."""
    return EncoderWork(
        gemm_flops=2.0 * llm.num_layers * tokens * _llm_layer_weights(llm),
        attention_flops=4.0 * llm.num_layers * tokens**2 * llm.hidden_size,
    )


def llm_weight_bytes(llm: StepLLMConfig) -> int:
    """Of Step-LLM in bf16: embedding, matrices and the two norms of every layer."""
    layers = llm.num_layers * (_llm_layer_weights(llm) + 2 * llm.hidden_size)
    return _BF16 * (llm.padded_vocab_size * llm.hidden_size + layers)


def _llm_layer_weights(llm: StepLLMConfig) -> int:
    width, groups = llm.hidden_size, 2 * llm.num_attention_groups * llm.head_dim
    return width * (width + groups) + width**2 + 3 * width * llm.ffn_width


def clip_work(clip: ClipSize) -> EncoderWork:
    """To encode a caption with HunyuanCLIP."""
    width, tokens = clip.hidden_size, clip.tokens
    weights = 4 * width**2 + 2 * width * clip.ffn_size
    return EncoderWork(
        gemm_flops=2.0 * clip.layers * tokens * weights,
        attention_flops=4.0 * clip.layers * tokens**2 * width,
    )


def _chunk(vae: VAEConfig, frames: int, height: int, width: int) -> EncoderWork:
    """Through the encoder, level by level."""
    widths, grid = vae.encoder_widths, (frames, height, width)
    work, channels = _convolution(3, vae.encoder_channels, grid), vae.encoder_channels
    for level, wide in enumerate(widths):
        for _ in range(vae.num_res_blocks):
            work, channels = work + _res_block(channels, wide, grid), wide
        if level < len(widths) - 1:
            grid, work = _downsampled(level, wide, grid, work)
    deep = widths[-1]
    work += _res_block(deep, deep, grid) + _attention(deep, grid) + _res_block(deep, deep, grid)
    work += _convolution(deep, vae.bottleneck_channels // 8, grid) + _passes(deep, grid, _NORM_PASSES)
    latent = ((grid[0] + 1) // 2, grid[1] // 2, grid[2] // 2)
    return work + _convolution(vae.bottleneck_channels, 2 * vae.latent_channels, latent)


def _downsampled(
    level: int, channels: int, grid: tuple[int, int, int], work: EncoderWork
) -> tuple[tuple[int, int, int], EncoderWork]:
    """The first level halves height and width frame by frame, the others frames (rounded up) as well."""
    frames, height, width = grid
    if level == 0:
        grid = (frames, height // 2, width // 2)
        return grid, work + _convolution(channels, channels, grid, frame_by_frame=True)
    kept = grid
    grid = ((frames + 1) // 2, height // 2, width // 2)
    return grid, work + _convolution(channels, channels, grid, frame_by_frame=kept[0] == 1)


def _res_block(inputs: int, outputs: int, grid: tuple[int, int, int]) -> EncoderWork:
    work = _convolution(inputs, outputs, grid) + _convolution(outputs, outputs, grid)
    if inputs != outputs:
        work += _pointwise(inputs, outputs, grid)
    return work + _passes(inputs, grid, _NORM_PASSES) + _passes(outputs, grid, _NORM_PASSES + _SUM_PASSES)


def _attention(channels: int, grid: tuple[int, int, int]) -> EncoderWork:
    positions = grid[0] * grid[1] * grid[2]
    scores = EncoderWork(attention_flops=4.0 * positions**2 * channels)
    return _pointwise(channels, channels, grid) * 4 + scores + _passes(channels, grid, _NORM_PASSES + _SUM_PASSES)


def _convolution(
    inputs: int, outputs: int, grid: tuple[int, int, int], frame_by_frame: bool | None = None
) -> EncoderWork:
    """3 x 3 x 3 to an output of `grid`; of a single frame only the newest of the three taps in time."""
    single = grid[0] == 1 if frame_by_frame is None else frame_by_frame
    taps = 9 if single else 27
    return EncoderWork(convolution_flops=2.0 * taps * inputs * outputs * grid[0] * grid[1] * grid[2])


def _pointwise(inputs: int, outputs: int, grid: tuple[int, int, int]) -> EncoderWork:
    return EncoderWork(convolution_flops=2.0 * inputs * outputs * grid[0] * grid[1] * grid[2])


def _passes(channels: int, grid: tuple[int, int, int], times: int) -> EncoderWork:
    return EncoderWork(moved_bytes=float(_BF16 * times * channels * grid[0] * grid[1] * grid[2]))
