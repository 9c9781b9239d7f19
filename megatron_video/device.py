"""Where the computation runs: CUDA with NCCL, or, where CUDA is absent, the CPU with gloo.

megatron-core 0.16.1 names CUDA in the middle of long functions (`device="cuda"`, `torch.cuda.current_device()`,
`tensor.type() == "torch.cuda.FloatTensor"`). On a machine without CUDA, `initialize` gives the modules of
megatron-core listed in `PATCHED_MODULES`, and only these, a view of `torch` in which those names mean the CPU. Code
outside megatron-core still fails if it says "cuda". Nothing is patched where CUDA is present.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from megatron_video.errors import UserError

AUDITED_MEGATRON_VERSIONS = ("0.16.1",)

# Modules of megatron.core that name CUDA on a path this project takes.
PATCHED_MODULES = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.distributed_data_parallel",
    "distributed.fsdp.mcore_fsdp_adapter",
    "distributed.fsdp.src.megatron_fsdp.megatron_fsdp",
    "distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "utils",
)

# Functions of torch that take `device=` and are called with "cuda" in those modules.
_FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like", "full", "zeros_like")

_CPU = torch.device("cpu")
_installed: DeviceInfo | None = None


@dataclass(frozen=True)
class DeviceInfo:
    """The device of this process and the torch.distributed backend that goes with it."""

    device: torch.device
    backend: str


def initialize() -> DeviceInfo:
    """Choose the device of this process and make megatron-core run on it; safe to call again.

    Raises:
        UserError: no CUDA, and a megatron-core version whose CUDA call sites were not audited.
    """
    global _installed
    if _installed is None:
        _installed = _initialize_cuda() if torch.cuda.is_available() else _initialize_cpu()
    return _installed


def _initialize_cuda() -> DeviceInfo:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return DeviceInfo(device, "nccl")


def _initialize_cpu() -> DeviceInfo:
    import megatron.core

    if megatron.core.__version__ not in AUDITED_MEGATRON_VERSIONS:
        raise UserError(
            f"megatron-core {megatron.core.__version__} has not been audited for running without CUDA; "
            f"install one of: {', '.join(AUDITED_MEGATRON_VERSIONS)}"
        )
    view = _CpuView()
    for name in PATCHED_MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        module.torch = view  # type: ignore[attr-defined]
    _fit_megatron_fsdp()
    _map_rng_state_to_cpu()
    _map_tensor_methods_to_cpu()
    return DeviceInfo(_CPU, "gloo")


class _CudaOnCpu:
    """`torch.cuda` as megatron-core sees it on a machine without CUDA."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return _CPU

    @staticmethod
    def synchronize() -> None:
        """The CPU has nothing to wait for."""

    @staticmethod
    def get_rng_state() -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def set_rng_state(state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def Stream() -> _StreamOnCpu:  # noqa: N802 (torch's name)
        return _StreamOnCpu()

    @staticmethod
    def current_stream() -> _StreamOnCpu:
        return _StreamOnCpu()

    @staticmethod
    def stream(stream: _StreamOnCpu) -> AbstractContextManager[None]:
        return nullcontext()


class _StreamOnCpu:
    """A CUDA stream, or an event on it: work on the CPU is done when the call that does it returns."""

    def wait_stream(self, other: _StreamOnCpu) -> None:
        """There is nothing to wait for."""

    def record_event(self) -> _StreamOnCpu:
        return self

    def wait(self) -> None:
        """There is nothing to wait for."""


class _CpuView:
    """`torch` as megatron-core sees it on a machine without CUDA; every other name is torch's own."""

    def __init__(self) -> None:
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    @staticmethod
    def device(name: Any) -> torch.device:
        return _CPU if str(name).startswith("cuda") else torch.device(name)

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        setattr(self, name, value)  # the next look-up is a plain attribute
        return value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _fit_megatron_fsdp() -> None:
    """Megatron-FSDP lays its ranks out on a mesh of "cuda" devices."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter

    def from_group(group: Any, device_type: str, **keywords: Any) -> torch.distributed.DeviceMesh:
        return torch.distributed.DeviceMesh.from_group(group, "cpu", **keywords)

    mcore_fsdp_adapter.DeviceMesh = SimpleNamespace(from_group=from_group)


def _map_rng_state_to_cpu() -> None:
    """Dropout and activation checkpointing save and restore "the CUDA generator": here that is the CPU's."""
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # megatron-core warns when the CPU generator moves inside a CUDA fork; here they are the same generator.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _map_tensor_methods_to_cpu() -> None:
    """`tensor.cuda()` and `tensor.type()` answer as on a GPU, but only when megatron-core asks."""
    plain_cuda, plain_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else plain_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        if isinstance(answer, str) and _called_by_megatron():
            return answer.replace("torch.", "torch.cuda.")
        return answer

    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _called_by_megatron() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return str(caller).startswith("megatron.core.")
