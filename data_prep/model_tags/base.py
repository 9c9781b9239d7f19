"""What a model tag is, and the batch of clips that it scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch

from megatron_video.manifest import Row

if TYPE_CHECKING:
    from data_prep.model_tags.clip import ClipEncoder


@dataclass
class TagBatch:
    """Clips with their sampled frames; embeddings that several tags need are computed once."""

    rows: Sequence[Row]
    frames: Sequence[np.ndarray]
    """uint8 [T, H, W, 3] a clip, inside its black borders; T is 8, less for short clips, 1 for images."""
    _embeddings: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def image_embeddings(self, encoder: ClipEncoder, numbers: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Unit vectors, float32 [T, D] a clip, of the clips at `numbers` (all if None)."""
        wanted = range(len(self.frames)) if numbers is None else numbers
        missing = [number for number in wanted if (id(encoder), number) not in self._embeddings]
        if missing:
            found = per_clip([self.frames[number] for number in missing], encoder.embed_images)
            self._embeddings |= {(id(encoder), number): vectors for number, vectors in zip(missing, found, strict=True)}
        return [self._embeddings[id(encoder), number] for number in wanted]


class ModelTag(Protocol):
    """One column of the manifest that a model fills."""

    column: ClassVar[str]

    def score(self, batch: TagBatch) -> list[float]:
        """One number a clip."""
        ...


def per_clip(frames: Sequence[np.ndarray], network: Callable[[list[np.ndarray]], torch.Tensor]) -> list[torch.Tensor]:
    """Run a network over the frames of all clips at once; its result [sum of T, ...] is split by clip again."""
    result = network([frame for clip in frames for frame in clip])
    return list(result.split([len(clip) for clip in frames]))
