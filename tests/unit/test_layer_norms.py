"""Sizes of layers: equal to what hooks would have seen, and free of cost when nobody asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_video.parallel import destroy_parallel
from training.fsdp import bare_model
from training.layer_norms import LayerProbe
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import Workload
from training.layout_matrix.worker import Session, build, micro_batches
from training.telemetry_config import TelemetryConfig
from training.train_step import train_step


@pytest.fixture
def session() -> Iterator[Session]:
    session = build(ONE_PROCESS, Workload())
    yield session
    destroy_parallel()


class Operations(TorchDispatchMode):
    """Names of everything that torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_sizes_are_those_that_hooks_see(session: Session) -> None:
    model, batches = bare_model(session.model[0]), micro_batches(session.workload)
    seen: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> object:
        def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
            seen.setdefault(name, []).append(output.detach().double().numpy().ravel())

        return keep

    parts = {"patch_embedding": model.patch_embedding} | {f"layers.{i}": layer for i, layer in model.layers.items()}
    handles = [part.register_forward_hook(hook(name)) for name, part in parts.items()]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = train_step(session.model, session.optimizer, batches, probe=LayerProbe(session.model, session.optimizer))
    for handle in handles:
        handle.remove()
    norms = result.layer_norms
    assert norms is not None
    assert set(norms.activation_rms) == set(parts)
    for name, outputs in seen.items():
        # On one process there is no padding, and all micro-batches count.
        assert norms.activation_rms[name] == pytest.approx(np.sqrt(np.mean(np.concatenate(outputs) ** 2)), rel=1e-6)
    own = [weight for name, weight in weights.items() if name.startswith("layers.2.")]
    assert norms.param_norm["layers.2"] == pytest.approx(float(torch.cat([w.flatten() for w in own]).norm()), rel=1e-6)
    # Clipping comes afterwards.
    total = np.linalg.norm(list(norms.grad_norm.values()))
    assert total == pytest.approx(result.grad_norm, rel=1e-6)
    assert total > 1


def test_a_step_that_does_not_measure_does_nothing_more(session: Session) -> None:
    def operations(probe: LayerProbe | None) -> list[str]:
        with Operations() as recorded:
            train_step(session.model, session.optimizer, micro_batches(session.workload)[:1], probe=probe)
        return recorded.names

    operations(None)  # the optimizer makes its state in its first step
    before = operations(None)
    measured = operations(LayerProbe(session.model, session.optimizer))
    assert operations(None) == before
    extra = len(measured) - len(before)
    assert extra > 0
    assert sum("vector_norm" in name for name in measured) > sum("vector_norm" in name for name in before)
    assert bare_model(session.model[0]).activation_watch is None


def test_steps_that_measure() -> None:
    assert [step for step in range(1, 10) if TelemetryConfig(activation_norms_every=4).measures_layers(step)] == [4, 8]
    assert not any(TelemetryConfig(activation_norms_every=0).measures_layers(step) for step in range(1, 10))
    with pytest.raises(ValueError, match="activation_norms_every=-1"):
        TelemetryConfig(activation_norms_every=-1)
