"""Optimizer state and averaged weights in checkpoints, the same however they are cut, so that any layout loads them.

For every parameter of the model three fp32 tensors in the parameter's own shape and layout, named
`optimizer.state.{param,exp_avg,exp_avg_sq}.<parameter>`, with an EMA a fourth named `ema.<parameter>`, and one count of
updates. Settings (betas, weight decay, ...) are not stored: they come from the configuration.

Under ZeRO-1 every parameter is put together on one of the replicas that hold its parts, and written and read there:
each keeps its share of the whole in memory, and no more than one other parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor

from training.ema import EMA
from training.main_parameters import MainParameter, main_parameters, only_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA_PREFIX = "ema"
_PREFIXES = {name: f"optimizer.state.{name}" for name in ("param", *MOMENTS)} | {"ema": EMA_PREFIX}
State = dict[int, dict[str, Any]]


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool, ema: EMA | None = None
) -> State:
    """Tensors to save, or to load into, cut like those in `model_state`; keyed by a parameter's number and its name.

    Under ZeRO-1 all ranks must call it together.
    """
    _start_moments(only_optimizer(optimizer))
    # A tensor of the state is cut and replicated exactly as the parameter it belongs to.
    tensors = _flat(extract_sharded_tensors(model_state)[0])
    templates = {id(getattr(tensor.data, "rows_of", tensor.data)): tensor for tensor in tensors}
    state: State = {}
    for number, (item, owner, values) in enumerate(_owned(optimizer, ema)):
        for name, value in values.items():
            whole = _placeholder(item, owner) if is_loading else item.gather(value, owner)
            if whole is not None:
                # Off the device at once: a GPU has no room for its share of everyone's parts.
                whole = whole if item.group is None else whole.cpu()
                template = _main_replica(templates[id(item.parameter)], item)
                state.setdefault(number, {})[name] = make_sharded_optimizer_tensor(template, whole, _PREFIXES[name])
    return state


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, loaded: State, updates: int, ema: EMA | None = None) -> None:
    """Take over what `sharded_optimizer_state(..., is_loading=True)` described, once it has been read."""
    for number, (item, owner, values) in enumerate(_owned(optimizer, ema)):
        for name, value in values.items():
            item.scatter(loaded.get(number, {}).get(name), owner, value)
    # The tensors carry no count; bias correction needs it.
    single = only_optimizer(optimizer)
    for group in single.optimizer.param_groups:
        if _counts_per_group(single):
            group["step"] = updates
        for main in [] if _counts_per_group(single) else group["params"]:
            single.optimizer.state[main]["step"].fill_(updates)


def count_updates(optimizer: MegatronOptimizer) -> int:
    """How often the weights were updated; refused steps do not count."""
    single = only_optimizer(optimizer)
    if _counts_per_group(single):
        return max((int(group.get("step", 0)) for group in single.optimizer.param_groups), default=0)
    return max((int(state["step"]) for state in single.optimizer.state.values() if state), default=0)


def _owned(
    optimizer: MegatronOptimizer, ema: EMA | None
) -> Iterator[tuple[MainParameter, int, dict[str, Tensor | None]]]:
    """Every parameter, the rank of its group that writes and reads it, and its values by name (None: not here)."""
    items = main_parameters(optimizer)
    averages = [None] * len(items) if ema is None else ema.averages
    state = only_optimizer(optimizer).optimizer.state
    loads: list[int] = []
    for item, average in zip(items, averages, strict=True):
        main = item.main
        values = {"param": None if main is None else main.detach()}
        values |= {name: None if main is None else state[main][name] for name in MOMENTS}
        if ema is not None:
            values["ema"] = average
        loads = loads or [0] * (item.group.size() if item.group else 1)
        # To the replica with the least so far; all replicas walk through the same list and so agree.
        owner = loads.index(min(loads))
        loads[owner] += item.parameter.numel()
        yield item, owner, values


def _placeholder(item: MainParameter, owner: int) -> Tensor | None:
    """Where a tensor is read into; None on replicas that get their part from another."""
    if item.group is not None and item.group.rank() != owner:
        return None
    if item.group is not None:
        return torch.empty(item.parameter.shape, dtype=torch.float32)
    assert item.main is not None
    return torch.empty_like(to_local_if_dtensor(item.main), dtype=torch.float32)


def _main_replica(template: ShardedTensor, item: MainParameter) -> ShardedTensor:
    """Among replicas the owner's is the only copy; over tensor-parallel ranks and stages the numbers stay."""
    if item.group is None:
        return template
    assert isinstance(template.replica_id, tuple)
    return replace(template, replica_id=(*template.replica_id[:-1], 0))


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


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _flat(value)
    elif isinstance(values, list):
        for value in values:
            yield from _flat(value)
    else:
        yield values
