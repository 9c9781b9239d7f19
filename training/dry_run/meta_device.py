"""Model, gradient buffers and optimizer built without memory: their own code runs, on tensors that have no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like)
_META = "torch.meta."


class _OnMeta(TorchFunctionMode):
    """Floating-point tensors that megatron-core puts on "its device" are on the meta device.

    A default device would not do: megatron-core names one.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        # Whole numbers are places of ranks, which are read.
        if function in _FACTORIES and kwargs.get("device") is not None and (dtype is None or dtype.is_floating_point):
            kwargs["device"] = "meta"
        answer = function(*args, **kwargs)
        # megatron-core tells number types apart by this name.
        if isinstance(answer, str) and answer.startswith(_META):
            return answer.replace(_META, "torch.cuda." if torch.cuda.is_available() else "torch.")
        return answer


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built within has shapes and types and takes no memory.

    The one thing that building asks other ranks for is which kinds of parameter groups they have; they all have the
    same, so this rank's answer stands for theirs.
    """
    gather = dist.all_gather_object
    dist.all_gather_object = _same_everywhere  # type: ignore[assignment]
    try:
        with _OnMeta():
            yield
    finally:
        dist.all_gather_object = gather


def _same_everywhere(found: list[Any], value: Any, group: Any = None) -> None:
    found[:] = [value] * len(found)
