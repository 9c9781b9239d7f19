"""Optimizer state and averaged weights in checkpoints, the same however they are cut, so that any layout loads them.

For every parameter of the model three fp32 tensors in the parameter's own shape and layout, named
`optimizer.state.{param,exp_avg,exp_avg_sq}.<parameter>`, with an EMA a fourth named `ema.<parameter>`, and one count of
updates. Settings (betas, weight decay, ...) are not stored: they come from the configuration.

Under ZeRO-1 each replica writes and reads the part of a parameter that it holds, a run of its flattened elements, as
the boxes that the run consists of: nothing is gathered, and no replica needs memory for the parts of another.
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
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor

from training.ema import EMA
from training.flat_parts import Box, boxes
from training.main_parameters import MainParameter, main_parameters, only_optimizer
from training.optimizer_offload import share_state, stepped_tensor, take_loaded_weights

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA_PREFIX, OPTIMIZER_PREFIX = "ema", "optimizer.state"
STATE_PREFIXES = {name: f"{OPTIMIZER_PREFIX}.{name}" for name in ("param", *MOMENTS)} | {"ema": EMA_PREFIX}
State = dict[int, dict[str, Any]]


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool, ema: EMA | None = None
) -> State:
    """Tensors to save, or to load into, cut like those in `model_state`; keyed by a parameter's number and its name."""
    _start_moments(only_optimizer(optimizer))
    # A tensor of the state is cut and replicated exactly as the parameter it belongs to.
    tensors = _flat(extract_sharded_tensors(model_state)[0])
    templates = {id(getattr(tensor.data, "rows_of", tensor.data)): tensor for tensor in tensors}
    state: State = {}
    for number, (item, values) in enumerate(_values(optimizer, ema)):
        template = templates[id(item.parameter)]
        for name, value in values.items():
            if value is not None:
                # Read beside the live tensor: a read that fails leaves it whole.
                held = torch.empty_like(to_local_if_dtensor(value), dtype=torch.float32) if is_loading else value
                state.setdefault(number, {})[name] = _sharded(template, item, held, STATE_PREFIXES[name])
    return state


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, loaded: State, updates: int, ema: EMA | None = None) -> None:
    """Take over what `sharded_optimizer_state(..., is_loading=True)` described, once it has been read."""
    for number, (_, values) in enumerate(_values(optimizer, ema)):
        for name, value in values.items():
            if value is not None:
                target, found = to_local_if_dtensor(value), loaded[number][name]
                # Boxes come in the order of the elements.
                target.copy_(torch.cat([box.flatten() for box in found]).view(target.shape))
    # The tensors carry no count; bias correction needs it.
    single = only_optimizer(optimizer)
    take_loaded_weights(single.optimizer)
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


def _values(optimizer: MegatronOptimizer, ema: EMA | None) -> Iterator[tuple[MainParameter, dict[str, Tensor | None]]]:
    """Every parameter and what this rank holds of its values, by name (None: nothing)."""
    items = main_parameters(optimizer)
    averages = [None] * len(items) if ema is None else ema.averages
    state = only_optimizer(optimizer).optimizer.state
    for item, average in zip(items, averages, strict=True):
        main = item.main
        values = {"param": None if main is None else main.detach()}
        values |= {name: None if main is None else state[main][name] for name in MOMENTS}
        if ema is not None:
            values["ema"] = average
        yield item, values


def _sharded(template: ShardedTensor, item: MainParameter, value: Tensor, prefix: str) -> list[ShardedTensor]:
    """What this rank holds of a parameter, described as pieces of the whole tensor."""
    if item.group is None or item.part is None:
        # All of it, or under Megatron-FSDP rows, as which the template is cut already.
        return [make_sharded_optimizer_tensor(template, value, prefix)]
    flat, pieces = value.view(-1), []
    for box in boxes(tuple(template.local_shape), item.part.start, item.part.stop):
        piece = _cut(template, box)
        data, flat = flat[: box.elements].view(box.shape), flat[box.elements :]
        pieces.append(make_sharded_optimizer_tensor(piece, data, prefix))
    return pieces


def _cut(template: ShardedTensor, box: Box) -> ShardedTensor:
    assert isinstance(template.replica_id, tuple)
    whole = (0,) * template.prepend_axis_num
    offset = tuple(start + more for start, more in zip(template.global_offset, (*whole, *box.offset), strict=True))
    return replace(
        template,
        data=None,
        local_shape=box.shape,
        global_offset=offset,
        axis_fragmentations=None,  # pieces of unequal sizes
        # No other data-parallel rank has it; over tensor-parallel ranks and stages the numbers stay.
        replica_id=(*template.replica_id[:-1], 0),
    )


def _counts_per_group(single: Any) -> bool:
    """torch's AdamW counts per parameter; the fused ones of Transformer Engine and Apex per group."""
    # In host memory it is torch's.
    return not isinstance(single.optimizer, (torch.optim.AdamW, HybridDeviceOptimizer))


def _start_moments(single: Any) -> None:
    """Give an optimizer that never stepped the moments it would start with."""
    for group in single.optimizer.param_groups:
        for main in group["params"]:
            state = single.optimizer.state[main]
            if not state:
                # Not by a step with zero gradients: weight decay would move the weights.
                stepped = stepped_tensor(single.optimizer, main)
                state.update({name: torch.zeros_like(stepped, dtype=torch.float32) for name in MOMENTS})
                if not _counts_per_group(single):
                    state["step"] = torch.zeros((), dtype=torch.float32)
    share_state(single.optimizer)


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _flat(value)
    elif isinstance(values, list):
        for value in values:
            yield from _flat(value)
    else:
        yield values
