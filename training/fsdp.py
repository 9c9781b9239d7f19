"""Megatron-FSDP: weights, gradients and optimizer state cut over the replicas.

A DiT layer is gathered before it computes and given up after it; embedders and head stay gathered for the whole step.
A rank owns some rows (dimension 0) of a parameter: unevenly many, of some parameters none. Checkpoints keep the names
and whole shapes that every other layout uses; each rank writes and reads its own rows of them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    FullyShardedDataParallel,
)
from megatron.core.extensions.transformer_engine import TELinear
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor, nn

from megatron_video.dit import VideoDiT
from megatron_video.dit.layer import DiTLayer
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig


class FullyShardedDiT(FullyShardedDataParallel):
    """A stage of the DiT under Megatron-FSDP."""

    def __init__(self, dit: VideoDiT, parallel: ParallelConfig) -> None:
        """Shard the weights of `dit` over the data- and context-parallel ranks.

        Raises:
            UserError: on CUDA with a single hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1).
        """
        device = next(dit.parameters()).device
        if device.type == "cuda" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            raise UserError(
                "CUDA_DEVICE_MAX_CONNECTIONS=1 leaves one hardware queue, in which the gathers of "
                "parallel.use_megatron_fsdp=true would wait for the computation; unset it or set it to 8"
            )
        # Asked for while the parameters are whole.
        whole = {name: replace(value, data=None) for name, value in dit.sharded_state_dict().items()}
        super().__init__(
            dit.config, _settings(parallel), _CalledAsModule(dit), fsdp_unit_modules=[DiTLayer], device=device
        )
        self._whole = whole

    @property
    def dit(self) -> VideoDiT:
        """The model, of which only rows are here between the steps."""
        return self.module.module.module

    def distributed_parameters(self) -> dict[str, Tensor]:
        """The fp32 parameters (DTensors) that the optimizer updates, under their names in the model."""
        named = self.param_and_grad_buffer.optimizer_named_parameters
        return {name.removeprefix("module."): parameter for name, parameter in named}

    def _fix_tensor_parallel_attributes(self, module: nn.Module) -> None:
        """Mark layers of Transformer Engine whose weights every tensor-parallel rank has.

        Without that package, megatron-core 0.16.1 would compare types with a stand-in that is none.
        """
        if isinstance(TELinear, type):
            super()._fix_tensor_parallel_attributes(module)

    def sharded_rows(self) -> dict[str, Any]:
        """What this rank saves of the model, or loads into it: its rows, in the type of the model's weights.

        Parameters of which it owns no row are left out.
        """
        rows = {name: value for name, value in self.distributed_parameters().items() if _rows(value).numel()}
        state = {name: _cut(self._whole[name], parameter) for name, parameter in rows.items()}
        objects = self.dit.state_dict()
        for name, whole in self._whole.items():
            if isinstance(whole, ShardedObject):
                state[name] = replace(whole, data=objects[name])
        return state

    @torch.no_grad()
    def load_rows(self, loaded: dict[str, Any]) -> None:
        """Take over what `sharded_rows` described, once it has been read."""
        parameters = self.distributed_parameters()
        for name in loaded.keys() & parameters.keys():
            _rows(parameters[name]).copy_(loaded[name])
        objects = {name: value for name, value in loaded.items() if name not in parameters}
        self.dit.load_state_dict(objects, strict=False)
        self.publish()

    def publish(self) -> None:
        """Make the model compute with the fp32 parameters as they are now."""
        # Weights that are gathered already would otherwise stay the old ones.
        self.module.synchronize_param_gather()
        self.module.install_optimized_model_weights()


def bare_model(chunk: DistributedDataParallel | FullyShardedDiT | VideoDiT) -> VideoDiT:
    """The model inside of what shares its gradients over replicas, or itself where nothing does."""
    if isinstance(chunk, VideoDiT):
        return chunk
    model: VideoDiT = chunk.dit if isinstance(chunk, FullyShardedDiT) else chunk.module
    return model


class _CalledAsModule(nn.Module):
    """Calls the model, where Megatron-FSDP would call its `forward` and so pass by the hooks it set on it."""

    def __init__(self, module: VideoDiT) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        return self.module(*inputs, **keywords)


def _settings(parallel: ParallelConfig) -> DistributedDataParallelConfig:
    strategy = parallel.data_parallel_sharding_strategy
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=strategy,
        # With `optim`, megatron-core 0.16.1 would add the reduced gradients to the ones they were reduced from.
        overlap_grad_reduce=strategy != "optim",
        overlap_param_gather=strategy == "optim_grads_params",
    )


def _cut(whole: ShardedTensor, parameter: Tensor) -> ShardedTensor:
    """The part of `whole` (a tensor-parallel rank's) that holds this rank's rows of `parameter`."""
    rows = _rows(parameter).to(whole.dtype)
    # Whose optimizer state is cut like this.
    rows.rows_of = parameter.orig_param  # type: ignore[attr-defined]
    first = parameter.megatron_fsdp_slice.start // rows[0].numel()  # type: ignore[attr-defined]
    axis = whole.prepend_axis_num
    offset = tuple(start + first * (place == axis) for place, start in enumerate(whole.global_offset))
    return replace(
        whole,
        data=rows,
        local_shape=tuple(rows.shape),
        global_offset=offset,
        axis_fragmentations=None,  # pieces of unequal sizes
        replica_id=(*whole.replica_id[:2], 0),  # no other data-parallel rank has these rows
    )


def _rows(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, sharing its memory."""
    return to_local_if_dtensor(tensor.detach())
