"""The fp32 numbers that the optimizer updates, for every parameter of the model: whole, or cut over replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor


@dataclass(frozen=True)
class MainParameter:
    """What this rank's optimizer holds of one parameter."""

    parameter: Tensor
    """The model's parameter, in its own dtype."""
    main: Tensor | None
    """What the optimizer updates, fp32: of the parameter's shape, under ZeRO-1 a flat part of it, under Megatron-FSDP a
    distributed tensor of which this rank has rows; None: no part."""
    part: slice | None
    """Which elements of the flattened parameter `main` is; None where it is all of them."""
    group: dist.ProcessGroup | None
    """Replicas over which the parameter is cut; None where every replica has all of it."""


def main_parameters(optimizer: MegatronOptimizer) -> list[MainParameter]:
    """One entry for every parameter this rank's model has, in an order that is the same on all its replicas.

    Under Megatron-FSDP only for those of which this rank has rows: each rank keeps to its own.
    """
    single = only_optimizer(optimizer)
    if isinstance(single, DistributedOptimizer) and single.ddp_config.use_megatron_fsdp:
        held: Iterator[Any] = (main for main, _ in _whole(single) if to_local_if_dtensor(main).numel())
        return [MainParameter(main.orig_param, main, main.megatron_fsdp_slice, None) for main in held]
    if isinstance(single, DistributedOptimizer):
        return list(_cut(single))
    return [MainParameter(parameter, main, None, None) for parameter, main in _whole(single)]


def only_optimizer(optimizer: MegatronOptimizer) -> Any:
    """The one optimizer of the chain; megatron-core chains a second one for experts only."""
    (single,) = optimizer.chained_optimizers
    return single


def _whole(single: Any) -> Iterator[tuple[Tensor, Tensor]]:
    # bf16 weights have fp32 copies, which are what AdamW updates; fp32 weights are updated themselves.
    if isinstance(single, Float16OptimizerWithFloat16Params):
        halves = zip(chain(*single.float16_groups), chain(*single.fp32_from_float16_groups), strict=True)
        return chain(halves, ((parameter, parameter) for parameter in chain(*single.fp32_from_fp32_groups)))
    return ((parameter, parameter) for group in single.optimizer.param_groups for parameter in group["params"])


def _cut(single: Any) -> Iterator[MainParameter]:
    # The buffers hold every parameter on every replica; the maps only those of which this replica has a part.
    for parameter in chain.from_iterable(buffer.param_index_map for buffer in single.buffers):
        place = single.model_param_group_index_map.get(parameter)
        if place is None:
            yield MainParameter(parameter, None, None, single.data_parallel_group)
            continue
        group, order = place
        held = single._get_model_param_range_map(parameter)["param"]
        main = single.optimizer.param_groups[group]["params"][order]
        yield MainParameter(parameter, main, slice(held.start, held.end), single.data_parallel_group)
