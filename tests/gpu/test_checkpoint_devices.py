"""Checkpoints between CPU and GPU, between the local spec and Transformer Engine's, and of FP8 runs."""

from __future__ import annotations

from pathlib import Path

import checkpoint_runs
import pytest
from gpu_runs import needs_cuda, needs_engine, on_cpu

pytestmark = [pytest.mark.gpu, needs_cuda]

FP32_CUDA, TF32, BF16 = 1e-4, 5e-3, 0.03


def test_local_checkpoint_goes_from_cpu_to_gpu_and_back(tmp_path: Path) -> None:
    on_cpu("save", str(tmp_path / "cpu"), "local", "fp32")
    checkpoint_runs.load(str(tmp_path / "cpu"), "local", "fp32", FP32_CUDA)
    checkpoint_runs.save(str(tmp_path / "gpu"), "local", "fp32")
    on_cpu("load", str(tmp_path / "gpu"), "local", "fp32", FP32_CUDA)


@needs_engine
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", TF32), ("bf16", BF16)])
def test_engine_checkpoint_goes_to_the_cpu_and_back(tmp_path: Path, precision: str, tolerance: float) -> None:
    on_cpu("save", str(tmp_path / "cpu"), "local", precision)
    checkpoint_runs.load(str(tmp_path / "cpu"), "transformer_engine", precision, tolerance)
    checkpoint_runs.save(str(tmp_path / "gpu"), "transformer_engine", precision)
    on_cpu("load", str(tmp_path / "gpu"), "local", precision, tolerance)


@needs_engine
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize("gather", [False, True], ids=["bf16 weights", "FP8 weights"])
def test_fp8_run_continues_where_it_was_and_loads_on_the_cpu(tmp_path: Path, recipe: str, gather: bool) -> None:
    checkpoint_runs.save(str(tmp_path), "transformer_engine", "bf16", recipe, gather)
    # The scales are part of the checkpoint; atomics in attention's backward are what may differ.
    checkpoint_runs.load(str(tmp_path), "transformer_engine", "bf16", 5e-3, recipe, gather)
    on_cpu("load", str(tmp_path), "local", "bf16", 0.1)


@needs_engine
def test_cpu_checkpoint_starts_an_fp8_run(tmp_path: Path) -> None:
    on_cpu("save", str(tmp_path), "local", "bf16")
    checkpoint_runs.load(str(tmp_path), "transformer_engine", "bf16", 0.1, "tensorwise")
