"""Computing with the averaged weights for a while, and going back to exactly the trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import to_local_if_dtensor

from training.ema import EMA
from training.fsdp import FullyShardedDiT
from training.main_parameters import main_parameters, only_optimizer
from training.optimizer import WrappedChunk


@contextmanager
def averaged_weights(model: list[WrappedChunk], optimizer: MegatronOptimizer, ema: EMA) -> Iterator[None]:
    """Within it the model computes with the averages; all ranks enter and leave it together.

    The optimizer's fp32 weights and the averages change places, tensor by tensor, so it needs memory for one more
    tensor only, and what comes back is what was there, bit for bit. The model's own weights are the fp32 ones rounded,
    before and after. Not for weights kept in FP8, whose scales may come out otherwise the second time.
    """
    finish_parameter_gathers(model)
    _exchange(optimizer, ema)
    try:
        _publish(model, optimizer)
        yield
    finally:
        _exchange(optimizer, ema)
        _publish(model, optimizer)


def finish_parameter_gathers(model: list[WrappedChunk]) -> None:
    """Have all weights on all ranks now: overlapped gathers would wait for the next forward pass of every replica."""
    for chunk in model:
        if not isinstance(chunk, FullyShardedDiT) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


@torch.no_grad()
def _exchange(optimizer: MegatronOptimizer, ema: EMA) -> None:
    for item, average in zip(main_parameters(optimizer), ema.averages, strict=True):
        if item.main is not None and average is not None:
            main, held = to_local_if_dtensor(item.main.detach()), to_local_if_dtensor(average)
            trained = main.clone()
            main.copy_(held)
            held.copy_(trained)


@torch.no_grad()
def _publish(model: list[WrappedChunk], optimizer: MegatronOptimizer) -> None:
    """Make the model compute with the optimizer's fp32 weights as they are now."""
    single = only_optimizer(optimizer)
    if isinstance(model[0], FullyShardedDiT):
        for chunk in model:
            chunk.publish()
        return
    # fp32 weights that are not cut are the model's own tensors.
    if isinstance(single, DistributedOptimizer | Float16OptimizerWithFloat16Params):
        single._copy_main_params_to_model_params()
    if isinstance(single, DistributedOptimizer):
        for chunk in model:
            chunk.start_param_sync(force_sync=True)
