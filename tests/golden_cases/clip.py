"""CLIP hidden states of all slots, pads included, against transformers' BertModel as it was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_video.text.clip import build_clip, clip_states, encoder_weights

TOLERANCE = 5e-5


@torch.no_grad()
def run(case: dict[str, Any], tensors: dict[str, Tensor], golden_dir: Path, name: str) -> None:
    """Load the recorded weights, with or without the `bert.` prefix, and compare all states."""
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    model = build_clip(case["config"], name)
    model.load_state_dict(encoder_weights(weights))
    states = clip_states(model, tensors["in.input_ids"], tensors["in.attention_mask"])
    torch.testing.assert_close(states, tensors["out"].float(), rtol=0, atol=TOLERANCE)
