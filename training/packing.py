"""Micro-batches of one replica that are joined into one sequence: what costs little alone fills the device together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.data import Batch


@dataclass(frozen=True)
class PackedBatch:
    """Micro-batches whose samples share one sequence; each sample keeps its own time, text and positions."""

    parts: list[Batch]

    def to(self, device: torch.device) -> PackedBatch:
        """The same on `device`, but for the lengths of the texts, by which the host cuts."""
        # Lengths read from a device would make the host wait for it in every micro-batch.
        return PackedBatch([replace(part.to(device), text_lengths=part.text_lengths) for part in self.parts])

    def arguments(self) -> dict[str, list[Tensor | None]]:
        """What the model is called with."""
        names = ("latents", "timestep", "llm_states", "clip_states", "text_lengths", "fps")
        return {name: [getattr(part, name) for part in self.parts] for name in names}


def positions(batch: Batch) -> int:
    """Latent positions of all samples."""
    return batch.latents[:, :, 0].numel()


def most_positions(batch: Batch | PackedBatch) -> int:
    """Latent positions of the longest sequence."""
    return sum(map(positions, batch.parts)) if isinstance(batch, PackedBatch) else batch.latents[0, :, 0].numel()


def packed(batches: Sequence[Batch], limit: int | None) -> list[Batch | PackedBatch]:
    """Join micro-batches that follow one another while they have at most `limit` latent positions together.

    What is larger alone stays alone, and so does everything without a limit.
    """
    if limit is None:
        return list(batches)
    return [group[0] if len(group) == 1 else PackedBatch(group) for group in _groups(batches, limit)]


def _groups(batches: Sequence[Batch], limit: int) -> Iterator[list[Batch]]:
    # In their order and not by best fit: which samples meet has no meaning, and all stages must join alike.
    group: list[Batch] = []
    for batch in batches:
        if group and sum(map(positions, group)) + positions(batch) > limit:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group
