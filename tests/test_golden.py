"""Every golden case found in `--golden-dir` (default tests/golden): the JSON's `kind` says which comparison it is."""

from __future__ import annotations

import importlib

import pytest
from golden_files import GoldenCase

# beginning of `kind` -> module of golden_cases with run(meta, tensors, folder, name)
KINDS = {
    "StepVideoModel": "dit",
    "StepVideoPipeline": "pipeline",
    "AutoencoderKL version=2": "vae",
    "FlowMatchDiscreteScheduler": "scheduler",
    "Step1Model": "stepllm",
    "HF BertModel": "clip",
}


@pytest.mark.golden
def test_golden_case(golden_case: GoldenCase) -> None:
    modules = [module for start, module in KINDS.items() if golden_case.kind.startswith(start)]
    assert modules, f"{golden_case.name}.json: unknown kind {golden_case.kind!r}; known: {', '.join(KINDS)}"
    case = importlib.import_module(f"golden_cases.{modules[0]}")
    case.run(golden_case.meta, golden_case.tensors(), golden_case.folder, golden_case.name)
