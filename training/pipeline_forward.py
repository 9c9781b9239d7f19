"""The model as one function of its inputs, in any layout: what sampling asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_video.dit import VideoDiT
from training.fsdp import bare_model
from training.optimizer import WrappedChunk


class PipelineForward:
    """Forward passes through all pipeline stages; every rank of the replica gets the velocity.

    One stage works at a time, as every Euler step needs the one before it: the schedules' overlap of micro-batches has
    nothing to offer here, and their rules on the number of micro-batches do not apply.

    Args:
        model: this rank's chunks, in eval mode; all ranks of a replica call this together, under no_grad.
    """

    def __init__(self, model: Sequence[WrappedChunk | VideoDiT]) -> None:
        self._chunks = list(model)
        self._bare = [bare_model(chunk) for chunk in model]
        self._group = self._bare[0].groups.pp
        self.dit_config = self._bare[0].dit_config

    def __call__(self, latents: Tensor, /, *conditions: Tensor | None) -> Tensor:
        """Velocity [b, T, C_out, h, w]; arguments as those of `VideoDiT.forward`."""
        size, last = self._group.size(), self._bare[0].stage.count - 1
        carried: Tensor | None = None
        for stage in range(last + 1):
            output = None
            # Stages go round the ranks, once for every chunk.
            if stage % size == self._group.rank():
                chunk = stage // size
                self._bare[chunk].set_input_tensor(carried)
                output = self._chunks[chunk](latents, *conditions)
            carried = self._pass_on(output, stage, latents)
        assert carried is not None
        return carried

    def _pass_on(self, output: Tensor | None, stage: int, latents: Tensor) -> Tensor | None:
        """The output of `stage` on the rank of the next one; of the last stage, on all ranks."""
        size, count = self._group.size(), self._bare[0].stage.count
        if size == 1:
            return output
        ranks = dist.get_process_group_ranks(self._group)
        source, target = ranks[stage % size], ranks[(stage + 1) % size]
        if stage == count - 1:
            channels = self.dit_config.out_channels
            shape = (*latents.shape[:2], channels, *latents.shape[3:])
            whole = self._empty(shape, latents) if output is None else output.contiguous()
            dist.broadcast(whole, source, group=self._group)
            return whole
        if output is not None:
            dist.send(output.contiguous(), target, group=self._group)
        if dist.get_rank() != target:
            return None
        received = self._empty(self._hidden_shape(latents), latents)
        dist.recv(received, source, group=self._group)
        return received

    def _hidden_shape(self, latents: Tensor) -> tuple[int, int, int]:
        """[s, b, D] of this rank's tokens."""
        model, patch = self._bare[0], self.dit_config.patch_size
        samples, frames, _, height, width = latents.shape
        parts = model.groups.cp.size() * (model.groups.tp.size() if model.config.sequence_parallel else 1)
        tokens = frames * (height // patch) * (width // patch)
        return model.padded_tokens(tokens) // parts, samples, self.dit_config.hidden_size

    def _empty(self, shape: tuple[int, ...], latents: Tensor) -> Tensor:
        return torch.empty(shape, dtype=self._bare[0].config.params_dtype, device=latents.device)
