"""The DiT over noised latents, for the hidden states inside it, pooled over tokens; in every layout."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_video.dit import VideoDiT
from megatron_video.dit.context_parallel import TokenLayout
from megatron_video.errors import UserError
from megatron_video.flow_matching import interpolate
from megatron_video.generation import velocity_function
from megatron_video.noise import NoiseSource
from megatron_video.text import TextStates
from training.alignment.feature_files import STATISTICS, Features, FeatureSettings
from training.alignment.feature_latents import Latent
from training.pipeline_forward import PipelineForward

# Part of every key of noise.
_STAGE = "features"
# Gathered together: 76,000 tokens of them take 160 MB in fp64.
_CHANNELS = 256


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
            pool_of = LayerPool(self.settings.layers, data.shape, self._model[0])
            for chunk in self._model:
                chunk.activation_watch = pool_of
            velocity(interpolate(noise, data, times).to(self._device), times.to(self._device))
            found.append(pool_of.pooled())
        features = torch.stack(found, dim=1)
        if not features.isfinite().all():
            raise UserError(
                f"the hidden states of {batch[0].prompt!r} are not finite; is the latent, and the precision?"
            )
        llm, clip = (torch.stack([state.float().mean(0) for state in column]) for column in _texts(batch))
        return Features(features, llm, clip)


class LayerPool:
    """STATISTICS of hidden states over all tokens of each latent; told by the model as it runs.

    Every rank of a stage gathers the tokens of the others, some channels at a time, and so pools what one process
    would: the change from frame to frame is between tokens that may lie on two ranks.

    Args:
        layers: which, counted from 0 over the whole model.
        shape: of the latents, [b, T, C, h, w].
        model: any chunk of this rank.
    """

    def __init__(self, layers: Sequence[int], shape: Sequence[int], model: VideoDiT) -> None:
        self._rows = {f"layers.{layer}": row for row, layer in enumerate(layers)}
        self._groups, self._cuts_sequence = model.groups, model.config.sequence_parallel
        batch, self._frames = shape[:2]
        size = batch, len(layers), len(STATISTICS), model.dit_config.hidden_size
        # Layers of other stages stay zero.
        self._pooled = torch.zeros(size, device=next(model.parameters()).device)

    def __call__(self, name: str, hidden: Tensor, tokens: TokenLayout) -> None:
        """Pool a layer's hidden states, of which [s, b, D] are this rank's."""
        if name not in self._rows:
            return
        for first in range(0, hidden.shape[-1], _CHANNELS):
            part = hidden[..., first : first + _CHANNELS].contiguous()
            whole = self._gathered(part)[: tokens.count].unflatten(0, (self._frames, -1))
            self._pooled[:, self._rows[name], :, first : first + _CHANNELS] = pool(whole)

    def pooled(self) -> Tensor:
        """[b, layers, statistics, D] fp32 on the CPU; all ranks of a replica together."""
        if self._groups.pp.size() > 1:
            dist.all_reduce(self._pooled, group=self._groups.pp)
        return self._pooled.cpu()

    def _gathered(self, tokens: Tensor) -> Tensor:
        if self._cuts_sequence:
            tokens = gather_from_sequence_parallel_region(tokens, group=self._groups.tp)
        if self._groups.cp.size() > 1:
            tokens = gather_from_sequence_parallel_region(tokens, group=self._groups.cp)
        return tokens


def pool(tokens: Tensor) -> Tensor:
    """STATISTICS, [b, statistics, D] fp32, of tokens [T, places, b, D]; what changes in a single frame is 0."""
    tokens = tokens.double()
    mean = tokens.mean((0, 1))
    deviation = (tokens - mean).square().mean((0, 1)).sqrt()
    change = tokens.diff(dim=0).square().mean((0, 1)).sqrt() if len(tokens) > 1 else torch.zeros_like(mean)
    return torch.stack([mean, deviation, change], dim=1).float()


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
