"""The optimizer in host memory: megatron-core's own classes, with a stand-in for what only a CUDA device has.

There "device" tensors are those of the model and of the optimizer above, and copies that were pinned are the host's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer, hybrid_optimizer
from test_training_optimizer import MODEL, make_batch

from megatron_video.config_io import load_config
from megatron_video.dit import build_dit
from megatron_video.errors import UserError
from megatron_video.layout import Hardware
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.checkpoint import TrainState, load_checkpoint, save_checkpoint, step_folder
from training.config import AdamWConfig, PretrainConfig
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import train_step

ZERO = ParallelConfig(use_distributed_optimizer=True)


class _Stream:
    def wait_stream(self, other: Any) -> None: ...
    def record_event(self) -> _Stream:
        return self

    def wait(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


class _TorchWithDevice:
    """torch as hybrid_optimizer sees it."""

    cuda = SimpleNamespace(current_stream=_Stream, Stream=_Stream, stream=lambda stream: nullcontext())

    @staticmethod
    def empty(*size: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        return torch.empty(*size, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pinned: list[torch.Tensor] = []

    def is_cuda(tensor: torch.Tensor) -> bool:
        asked_by = sys._getframe(1).f_globals.get("__name__")
        return asked_by == hybrid_optimizer.__name__ and not any(tensor is copy for copy in pinned)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(hybrid_optimizer, "torch", _TorchWithDevice())
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(is_cuda), raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    yield
    destroy_parallel()


def build(offload: bool, seed: int = 1) -> tuple[Any, Any]:
    from megatron_video.device import initialize

    initialize_parallel(ZERO, 0, initialize())
    chunks = build_dit(MODEL, ZERO, torch.bfloat16, device=torch.device("cpu"), init_seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in chunks[0].parameters():
        # The initialisation's zeros would keep most gradients at zero.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model = wrap_data_parallel(chunks, ZERO)
    return model, build_optimizer(model, AdamWConfig(weight_decay=0.3, cpu_offload=offload), ZERO)


def steps(model: Any, optimizer: Any, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        set_learning_rate(optimizer, 1e-2, 0.3)
        losses.append(train_step(model, optimizer, [make_batch(seed, 2, 3)]).loss)
    return losses


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model[0].named_parameters()}


def test_it_trains_to_the_numbers_of_the_device(device: None) -> None:
    model, optimizer = build(False)
    losses, expected = steps(model, optimizer, range(4)), weights(model)
    destroy_parallel()
    model, optimizer = build(True)
    hybrid = optimizer.chained_optimizers[0].optimizer
    assert isinstance(hybrid, HybridDeviceOptimizer)
    assert hybrid.gpu_optimizer is None
    assert steps(model, optimizer, range(4)) == pytest.approx(losses, rel=1e-3)
    for name, parameter in weights(model).items():
        torch.testing.assert_close(parameter, expected[name], msg=name)


@pytest.mark.parametrize("offloaded", [(True, True), (True, False), (False, True)])
def test_its_checkpoints_continue_here_and_there(device: None, tmp_path: Path, offloaded: tuple[bool, bool]) -> None:
    model, optimizer = build(False)
    steps(model, optimizer, range(3))
    expected_losses = steps(model, optimizer, range(3, 6))
    expected = weights(model)
    destroy_parallel()
    saved, continued = offloaded
    model, optimizer = build(saved)
    steps(model, optimizer, range(3))
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=3), PretrainConfig(model=MODEL))
    destroy_parallel()
    # Another seed: whatever is not loaded shows.
    model, optimizer = build(continued, seed=5)
    load_checkpoint(step_folder(tmp_path, 3), model, optimizer)
    assert steps(model, optimizer, range(3, 6)) == pytest.approx(expected_losses, rel=1e-3)
    for name, parameter in weights(model).items():
        torch.testing.assert_close(parameter, expected[name], msg=name)


def test_it_is_refused_where_it_cannot_run() -> None:
    config = load_config(
        PretrainConfig, None, ["optimizer.cpu_offload=true", "parallel.use_distributed_optimizer=true"]
    )
    with pytest.raises(UserError, match="torch sees no device"):
        check_layout(config.layout(1, Hardware()))
    check_layout(config.layout(1, Hardware(True, (9, 0), None, (12, 8))))
    with pytest.raises(UserError, match=r"precision=fp32.*16-bit weights"):
        load_config(
            PretrainConfig,
            None,
            ["optimizer.cpu_offload=true", "parallel.use_distributed_optimizer=true", "training.precision=fp32"],
        )
    with pytest.raises(UserError, match=r"use_distributed_optimizer=false.*behind the back"):
        load_config(PretrainConfig, None, ["optimizer.cpu_offload=true"])
    with pytest.raises(UserError, match=r"use_megatron_fsdp=true.*plain tensors"):
        load_config(PretrainConfig, None, ["optimizer.cpu_offload=true", "parallel.use_megatron_fsdp=true"])
