"""Sizes of a DiT, and how many parameters they make: all that the planner needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_video.dit.config import DiTConfig
from megatron_video.dit.embedders import SINUSOID_CHANNELS


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    cut: int
    """In matrices that tensor-parallel ranks share."""
    whole: int
    """That every tensor-parallel rank has."""

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.cut + other.cut, self.whole + other.whole)

    def __mul__(self, count: int) -> Parameters:
        return Parameters(self.cut * count, self.whole * count)

    @property
    def total(self) -> int:
        """Of the model."""
        return self.cut + self.whole

    def of_rank(self, tensor_parallel_size: int) -> float:
        """On one tensor-parallel rank."""
        return self.cut / tensor_parallel_size + self.whole


@dataclass(frozen=True)
class ModelShape:
    """A DiT of blocks with self-attention, cross-attention and feed-forward. Also others' models, which have none of
    our classes."""

    num_layers: int
    """Blocks."""
    hidden_size: int
    """Width D."""
    num_heads: int
    """Of both attentions."""
    ffn_size: int
    """Width of the feed-forward."""
    in_channels: int = 64
    """Latent channels of a token."""
    out_channels: int = 64
    """Of the prediction."""
    llm_channels: int = 6144
    """Of the language model's states."""
    clip_channels: int | None = 1024
    """Of CLIP's states, if there are any."""
    additional_conditions: bool = False
    """Embeddings of resolution, frames and fps (DiTConfig.use_additional_conditions)."""
    embedders_in_every_chunk: bool = True
    """Whether each chunk of an interleaved stage has embedders of its own, as our model does; else each rank."""

    @staticmethod
    def of(dit: DiTConfig) -> ModelShape:
        """The sizes of one of our models."""
        area = dit.patch_size**2
        return ModelShape(
            num_layers=dit.num_layers,
            hidden_size=dit.hidden_size,
            num_heads=dit.num_attention_heads,
            ffn_size=dit.ffn_multiplier * dit.hidden_size,
            in_channels=dit.in_channels * area,
            out_channels=dit.out_channels * area,
            llm_channels=dit.llm_channels,
            clip_channels=dit.clip_channels,
            additional_conditions=dit.use_additional_conditions,
        )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads

    @property
    def layer_parameters(self) -> Parameters:
        """Of one block: eight square matrices of the attentions, two of the feed-forward; norms and modulation."""
        d = self.hidden_size
        return Parameters(cut=8 * d * d + 2 * d * self.ffn_size, whole=6 * d + 4 * d + 4 * self.head_dim)

    @property
    def embedder_parameters(self) -> Parameters:
        """Of time and text: every pipeline stage has them, and every chunk of it."""
        d = self.hidden_size
        text = (self.llm_channels + 1) * d + (d + 1) * d
        if self.clip_channels is not None:
            text += (self.clip_channels + 1) * d
        return Parameters(cut=6 * d * (d + 1), whole=_two_linears(d) + text + self._additional_parameters)

    @property
    def _additional_parameters(self) -> int:
        if not self.additional_conditions:
            return 0
        # Height and width share one embedder of half the width; frames and fps have one each.
        return _two_linears(self.hidden_size // 2) + 2 * _two_linears(self.hidden_size)

    @property
    def patch_parameters(self) -> Parameters:
        """Of the patch embedding, on the first stage."""
        return Parameters(cut=0, whole=(self.in_channels + 1) * self.hidden_size)

    @property
    def head_parameters(self) -> Parameters:
        """Of the output head, on the last stage."""
        return Parameters(cut=0, whole=2 * self.hidden_size + (self.hidden_size + 1) * self.out_channels)

    @property
    def parameters(self) -> Parameters:
        """Of the whole model."""
        ends = self.embedder_parameters + self.patch_parameters + self.head_parameters
        return self.layer_parameters * self.num_layers + ends

    def stage_parameters(self, stage: int, stages: int, chunks: int = 1) -> Parameters:
        """Of one rank of the pipeline, with all of its chunks; an upper bound where layers do not divide evenly."""
        embedders = self.embedder_parameters * (chunks if self.embedders_in_every_chunk else 1)
        here = self.layer_parameters * -(-self.num_layers // stages) + embedders
        if stage == 0:
            here = here + self.patch_parameters
        return here + self.head_parameters if stage == stages - 1 else here


def _two_linears(width: int) -> int:
    return (SINUSOID_CHANNELS + 1) * width + (width + 1) * width
