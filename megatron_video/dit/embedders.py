"""What comes before the blocks: patches, time and its modulation, text (reference 1.3, steps 1 to 4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_video.dit.config import DiTConfig
from megatron_video.dit.norms import mark_sequence_parallel
from megatron_video.dit.specs import LayerSpec

SINUSOID_CHANNELS = 256
TIME_SCALE = 1000.0


def sinusoid(values: Tensor) -> Tensor:
    """[n] numbers -> [n, 256] in fp32: cosines first, frequencies exp(-ln(1e4) j / 128)."""
    half = SINUSOID_CHANNELS // 2
    indices = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(indices * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbedding(nn.Module):
    """Linear map of spatial patches; the weight keeps the shape of the released convolution, [D, C, p, p]."""

    def __init__(self, dit: DiTConfig, config: TransformerConfig) -> None:
        super().__init__()
        shape = (dit.hidden_size, dit.in_channels, dit.patch_size, dit.patch_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(dit.hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self, config)

    def forward(self, patches: Tensor) -> Tensor:
        """[s, b, C * p * p] -> [s, b, D]."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class SinusoidMLP(nn.Module):
    """Number -> fp32 sinusoid -> linear -> SiLU -> linear."""

    def __init__(self, channels: int, config: TransformerConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, channels, dtype=config.params_dtype)
        self.linear_2 = nn.Linear(channels, channels, dtype=config.params_dtype)

    def forward(self, values: Tensor) -> Tensor:
        """[n] -> [n, channels]."""
        features = sinusoid(values).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class TimeConditioning(MegatronModule):
    """Time (and, if configured, resolution, frames and fps) -> embedding e [b, D] and modulation [b, 6, D].

    The 6 D projection is column-parallel over an input that every rank holds. Its gathered output meets only this
    rank's tokens under sequence parallelism, so the gather's backward then sums over the ranks.
    """

    def __init__(
        self, dit: DiTConfig, config: TransformerConfig, spec: LayerSpec, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        width = dit.hidden_size
        self.tp_group = groups.tp
        self.released_precision = dit.released_precision
        self.time_embedder = SinusoidMLP(width, config)
        self.additional = dit.use_additional_conditions
        if self.additional:
            self.resolution_embedder = SinusoidMLP(width // 2, config)
            self.num_frames_embedder = SinusoidMLP(width, config)
            self.fps_embedder = SinusoidMLP(width, config)
        self.modulation_linear = spec.replicated_input_column_linear(
            width,
            6 * width,
            config=config,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=groups.tp,
        )

    def forward(self, timestep: Tensor, grid: tuple[int, int, int], fps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed.

        Args:
            timestep: fp32 [b] in [0, 1).
            grid: patched latent grid (T, h, w).
            fps: [b], or None to leave it out; used only with additional conditions.
        """
        dtype = self.time_embedder.linear_1.weight.dtype
        timestep = timestep.to(dtype) if self.released_precision else timestep.float()
        embedding = self.time_embedder(timestep * TIME_SCALE)
        if self.additional:
            embedding = embedding + self._additional(grid, fps, embedding.shape[0], timestep.device)
        projected, _ = self.modulation_linear(F.silu(embedding).unsqueeze(0))
        gather = (
            all_gather_last_dim_from_tensor_parallel_region
            if self.config.sequence_parallel
            else gather_from_tensor_model_parallel_region
        )
        modulation = gather(projected, group=self.tp_group)
        return embedding, modulation.view(embedding.shape[0], 6, -1)

    def _additional(self, grid: tuple[int, int, int], fps: Tensor | None, batch: int, device: torch.device) -> Tensor:
        frames, height, width = grid
        size = torch.tensor([height, width], dtype=torch.float32, device=device)
        embedding = self.resolution_embedder(size).flatten()[None].expand(batch, -1)
        count = torch.full((batch,), float(frames), device=device)
        embedding = embedding + self.num_frames_embedder(count)
        return embedding if fps is None else embedding + self.fps_embedder(fps)


class TextProjection(nn.Module):
    """Step-LLM and CLIP states -> text tokens [L, b, D], CLIP first (reference 1.3, step 4)."""

    def __init__(self, dit: DiTConfig, config: TransformerConfig) -> None:
        super().__init__()
        width, dtype = dit.hidden_size, config.params_dtype
        self.norm_eps = dit.norm_eps
        self.llm_linear_1 = nn.Linear(dit.llm_channels, width, dtype=dtype)
        self.llm_linear_2 = nn.Linear(width, width, dtype=dtype)
        self.clip_linear = None if dit.clip_channels is None else nn.Linear(dit.clip_channels, width, dtype=dtype)

    def forward(self, llm_states: Tensor, clip_states: Tensor | None) -> Tensor:
        """Project [b, L1, llm] and [b, L2, clip] to [L2 + L1, b, D]."""
        dtype = self.llm_linear_1.weight.dtype
        llm = F.layer_norm(llm_states.to(dtype), llm_states.shape[-1:], eps=self.norm_eps)
        text = self.llm_linear_2(F.gelu(self.llm_linear_1(llm), approximate="tanh"))
        if self.clip_linear is not None and clip_states is not None:
            text = torch.cat([self.clip_linear(clip_states.to(dtype)), text], dim=1)
        return text.transpose(0, 1)


def padded_text(text: Tensor, text_lengths: Tensor | None, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Text tokens [L, b, D] with zeros up to a `multiple` of tokens, and the mask that hides what must not be seen."""
    visible, batch = text.shape[:2]
    padding = -visible % multiple
    if padding:
        text = F.pad(text, (0, 0, 0, 0, 0, padding))
        if text_lengths is None:
            text_lengths = torch.full((batch,), visible, device=text.device)
    return text, hidden_text_mask(text_lengths, len(text))


def hidden_text_mask(text_lengths: Tensor | None, num_text_tokens: int) -> Tensor | None:
    """Key j of sample b is hidden unless j < text_lengths[b]; bool [b, 1, 1, L], True = hidden."""
    if text_lengths is None:
        return None
    positions = torch.arange(num_text_tokens, device=text_lengths.device)
    return (positions >= text_lengths[:, None])[:, None, None, :]
