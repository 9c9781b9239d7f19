"""The DiT over noised latents, for the hidden states inside it, pooled over tokens; in every layout.

Hidden states are summed where they are, frame by frame, on the rank that holds the tokens; the sums, a few numbers per
channel, are added over the ranks. So nothing of the size of a sequence is gathered or kept.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_video.dit import VideoDiT
from megatron_video.dit.context_parallel import TokenLayout
from megatron_video.errors import UserError
from megatron_video.flow_matching import interpolate
from megatron_video.generation import velocity_function
from megatron_video.noise import NoiseSource
from megatron_video.text import TextStates
from training.alignment.feature_files import Features, FeatureSettings
from training.alignment.feature_latents import Latent
from training.pipeline_forward import PipelineForward

# Part of every key of noise.
_STAGE = "features"


class FeaturePass:
    """Features of latents under one model.

    Args:
        model: this rank's chunks, with the checkpoint's weights; layers behind the last wanted one are taken off.
        settings: of the features.
    """

    def __init__(self, model: Sequence[VideoDiT], settings: FeatureSettings) -> None:
        self.settings = settings
        self._model = list(model)
        self._noise = NoiseSource(settings.seed, _STAGE)
        self._forward = PipelineForward(self._model)
        self._device = next(self._model[0].parameters()).device
        for chunk in self._model:
            take_off_layers(chunk, max(settings.layers))
            chunk.eval().requires_grad_(False)

    @torch.no_grad()
    def run(self, batch: Sequence[Latent]) -> Features:
        """Features of latents of one shape and frame rate; all ranks of a replica call it together, and all get them.

        Raises:
            UserError: a shape that the model does not take, or hidden states that are not finite.
        """
        data = torch.stack([item.latent.float() for item in batch])
        noise = torch.stack([self._noise.noise(0, _number_of(item.prompt), item.latent.shape) for item in batch])
        states = [TextStates(item.llm, item.clip, 0, 0).to(self._device, torch.bfloat16) for item in batch]
        rate = batch[0].fps if self._model[0].dit_config.use_additional_conditions else None
        velocity = velocity_function(self._forward, states, states[0], rate)
        found = []
        for time in self.settings.times:
            times = torch.full((len(batch),), time)
            sums = LayerSums(self.settings.layers, data.shape, self._model[0])
            for chunk in self._model:
                chunk.activation_watch = sums
            velocity(interpolate(noise, data, times).to(self._device), times.to(self._device))
            found.append(sums.pooled())
        features = torch.stack(found, dim=1)
        if not features.isfinite().all():
            raise UserError(
                f"the hidden states of {batch[0].prompt!r} are not finite; is the latent, and the precision?"
            )
        llm, clip = (torch.stack([state.float().mean(0) for state in column]) for column in _texts(batch))
        return Features(features, llm, clip)


class LayerSums:
    """Sums of hidden states and of their squares over the tokens of every latent frame; told by the model as it runs.

    Args:
        layers: which, counted from 0 over the whole model.
        shape: of the latents, [b, T, C, h, w].
        model: any chunk of this rank.
    """

    def __init__(self, layers: Sequence[int], shape: Sequence[int], model: VideoDiT) -> None:
        self._rows = {f"layers.{layer}": row for row, layer in enumerate(layers)}
        self._groups, self._cuts_sequence = model.groups, model.config.sequence_parallel
        batch, self._frames, _, height, width = shape
        self._per_frame = height // model.dit_config.patch_size * (width // model.dit_config.patch_size)
        # fp64: a variance is a small difference of large sums, and ranks add them in another order.
        self._sums = torch.zeros(
            (len(layers), 2, self._frames, batch, model.dit_config.hidden_size),
            dtype=torch.float64,
            device=next(model.parameters()).device,
        )

    def __call__(self, name: str, hidden: Tensor, tokens: TokenLayout) -> None:
        """Add this rank's tokens of a layer, [s, b, D]."""
        if name not in self._rows:
            return
        sums = self._sums[self._rows[name]]
        for frame in range(self._frames):
            first, end = (
                min(max(place - tokens.first, 0), len(hidden))
                for place in (frame * self._per_frame, (frame + 1) * self._per_frame)
            )
            # A frame at a time: fp64 of all tokens would be four times what the model holds.
            part = hidden[first:end].double()
            sums[0, frame] += part.sum(0)
            sums[1, frame] += part.square().sum(0)

    def pooled(self) -> Tensor:
        """STATISTICS over all tokens, [b, layers, statistics, D] fp32 on the CPU; all ranks of a replica together."""
        for group in self._adding():
            dist.all_reduce(self._sums, group=group)
        means = self._sums / self._per_frame
        mean, square = means.mean(2).unbind(1)
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        steps = means[:, 0].diff(dim=1)
        change = steps.square().mean(1).sqrt() if self._frames > 1 else torch.zeros_like(mean)
        return torch.stack([mean, deviation, change], dim=2).transpose(0, 1).float().cpu()

    def _adding(self) -> Iterator[Any]:
        """Groups whose ranks hold different tokens, or different layers."""
        groups = self._groups
        for group, cut in ((groups.tp, self._cuts_sequence), (groups.cp, True), (groups.pp, True)):
            if cut and group.size() > 1:
                yield group


def take_off_layers(chunk: VideoDiT, last: int) -> None:
    """Leave away the layers behind `last`: nobody asks what they compute."""
    for number in [number for number in chunk.layers if int(number) > last]:
        del chunk.layers[number]


def batches(items: Iterator[Latent], size: int) -> Iterator[list[Latent]]:
    """Neighbours of one shape and frame rate, at most `size` together."""
    for _, alike in itertools.groupby(items, key=lambda item: (item.latent.shape, item.fps)):
        yield from _cut(alike, size)


def _cut(items: Iterator[Latent], size: int) -> Iterator[list[Latent]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _texts(batch: Sequence[Latent]) -> tuple[list[Tensor], list[Tensor]]:
    return [item.llm for item in batch], [item.clip for item in batch]


def _number_of(prompt: str) -> int:
    """The noise is keyed by the prompt: winner and loser see the same, and a sample the same in a pair and alone."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "little")
