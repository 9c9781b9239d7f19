"""Optimizer state in checkpoints, the same whether it is sharded over replicas or not, so that each loads the other's.

For every parameter of the model three fp32 tensors in the parameter's own shape and layout, named
`optimizer.state.{param,exp_avg,exp_avg_sq}.<parameter>`, and one count of updates. Settings (betas, weight decay, ...)
are not stored: they come from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def sharded_optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool) -> Any:
    """Tensors to save, or to load into, cut like those in `model_state`; keyed by a parameter's number."""
    single = _only(optimizer)
    _start_moments(single)
    if isinstance(single, DistributedOptimizer):
        # Gathers the shards of all replicas into whole parameters: that is what makes the form independent of DP.
        return single.sharded_param_state_fully_reshardable(model_state, is_loading, metadata={})
    # A tensor of the state is cut and replicated exactly as the parameter it belongs to.
    sharded = {id(tensor.data): tensor for tensor in _flat(extract_sharded_tensors(model_state)[0])}
    return {
        number: {
            name: make_sharded_optimizer_tensor(sharded[id(parameter)], value, f"optimizer.state.{name}")
            for name, value in _values(single, main).items()
        }
        for number, (parameter, main) in enumerate(_parameters(single))
    }


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, loaded: Any, updates: int) -> None:
    """Take over what `sharded_optimizer_state(..., is_loading=True)` described, once it has been read."""
    single = _only(optimizer)
    if isinstance(single, DistributedOptimizer):
        single.load_parameter_state_from_fully_reshardable(loaded)
    else:
        for number, (_, main) in enumerate(_parameters(single)):
            for name, value in _values(single, main).items():
                value.copy_(loaded[number][name])
    # The shards carry no count; bias correction needs it.
    for group in single.optimizer.param_groups:
        if _counts_per_group(single):
            group["step"] = updates
        for main in [] if _counts_per_group(single) else group["params"]:
            single.optimizer.state[main]["step"].fill_(updates)


def count_updates(optimizer: MegatronOptimizer) -> int:
    """How often the weights were updated; refused steps do not count."""
    single = _only(optimizer)
    if _counts_per_group(single):
        return max((int(group.get("step", 0)) for group in single.optimizer.param_groups), default=0)
    return max((int(state["step"]) for state in single.optimizer.state.values() if state), default=0)


def _only(optimizer: MegatronOptimizer) -> Any:
    # megatron-core chains a second optimizer for experts only.
    (single,) = optimizer.chained_optimizers
    return single


def _counts_per_group(single: Any) -> bool:
    """torch's AdamW counts per parameter; the fused ones of Transformer Engine and Apex per group."""
    return not isinstance(single.optimizer, torch.optim.AdamW)


def _start_moments(single: Any) -> None:
    """Give an optimizer that never stepped the moments it would start with."""
    for group in single.optimizer.param_groups:
        for main in group["params"]:
            state = single.optimizer.state[main]
            if not state:
                # Not by a step with zero gradients: weight decay would move the weights.
                state.update({name: torch.zeros_like(main, dtype=torch.float32) for name in MOMENTS})
                if not _counts_per_group(single):
                    state["step"] = torch.zeros((), dtype=torch.float32)


def _parameters(single: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of the model with the fp32 one that the optimizer updates, in the same order on all ranks."""
    # bf16 weights have fp32 copies, which are what AdamW updates; fp32 weights are updated themselves.
    if isinstance(single, Float16OptimizerWithFloat16Params):
        halves = zip(chain(*single.float16_groups), chain(*single.fp32_from_float16_groups), strict=True)
        return chain(halves, ((parameter, parameter) for parameter in chain(*single.fp32_from_fp32_groups)))
    return ((parameter, parameter) for group in single.optimizer.param_groups for parameter in group["params"])


def _values(single: Any, main: Tensor) -> dict[str, Tensor]:
    return {"param": main.detach(), **{name: single.optimizer.state[main][name] for name in MOMENTS}}


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _flat(value)
    elif isinstance(values, list):
        for value in values:
            yield from _flat(value)
    else:
        yield values
