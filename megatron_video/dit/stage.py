"""Which part of the model a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_video.parallel import ParallelConfig


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, or one chunk of it under the interleaved schedule."""

    number: int
    """Place in the order of the data's way through the model."""
    count: int
    """Number of stages times chunks."""
    virtual_stage: int | None
    """Index of the chunk on its rank; None without virtual pipeline stages."""
    layer_numbers: range
    """Layers of the whole model held here."""
    recomputed_layers: int
    """How many of them, from the first, recompute all their activations in the backward pass."""
    recomputed_modules: frozenset[str]
    """Parts of every layer that recompute theirs (ParallelConfig.recompute_modules)."""

    @property
    def is_first(self) -> bool:
        """Whether the patch embedding is here."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether the output head is here."""
        return self.number == self.count - 1


def stages_of_rank(num_layers: int, parallel: ParallelConfig, pipeline_rank: int) -> list[Stage]:
    """The stage, or under the interleaved schedule the chunks, of one pipeline rank.

    The layers divide over the stages (megatron_video.layout_rules).
    """
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    pipeline = parallel.pipeline_model_parallel_size
    count = pipeline * chunks
    per_stage = num_layers // count
    granularity, limit = parallel.recompute_granularity, parallel.recompute_num_layers
    recomputed = (per_stage if limit is None else min(limit, per_stage)) if granularity == "full" else 0
    modules = frozenset(parallel.recompute_modules if granularity == "selective" else ())
    stages = []
    for chunk in range(chunks):
        number = chunk * pipeline + pipeline_rank
        layers = range(number * per_stage, (number + 1) * per_stage)
        virtual = chunk if chunks > 1 else None
        stages.append(Stage(number, count, virtual, layers, recomputed, modules))
    return stages
