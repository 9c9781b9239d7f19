"""Step-LLM hidden states, pad positions included, against the reference code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_video.text.step_llm import StepLLM, StepLLMConfig

TOLERANCE = 5e-5


@torch.no_grad()
def run(case: dict[str, Any], tensors: dict[str, Tensor], golden_dir: Path, name: str) -> None:
    """Load the recorded weights under their released names and compare all states."""
    model = StepLLM(StepLLMConfig.from_json(case["config"], name))
    model.load_state_dict({key.removeprefix("sd."): w for key, w in tensors.items() if key.startswith("sd.")})
    states = model(tensors["in.input_ids"])
    torch.testing.assert_close(states, tensors["out"].float(), rtol=0, atol=TOLERANCE)
