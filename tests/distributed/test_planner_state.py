"""Weights, gradients, optimizer and averages as the planner has them, against what ranks hold after a step."""

from __future__ import annotations

from typing import Any

import pytest
from planner_state import predicted_state, state_on_this_rank

from megatron_video.layout import Precision
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed

ZERO = {"use_distributed_optimizer": True}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("fields", "size", "precision"),
    [
        ({}, 2, "bf16"),
        (ZERO, 4, "bf16"),
        (ZERO, 2, "fp32"),
        ({**TP2_SP, **ZERO}, 4, "bf16"),
        ({**TP2_SP, **PP2}, 4, "bf16"),
        # Every chunk has embedders of its own.
        ({**PP2, "virtual_pipeline_model_parallel_size": 2}, 2, "bf16"),
        ({"context_parallel_size": 2, **ZERO}, 4, "bf16"),
        ({**PP2, **ZERO}, 4, "fp32"),
    ],
    ids=["DP2", "DP4 ZeRO", "DP2 ZeRO fp32", "TP2 SP DP2", "TP2 SP PP2", "PP2 VPP2", "CP2 DP2", "PP2 DP2 fp32"],
)
def test_state_is_what_ranks_hold(ranks: RankPool, fields: dict[str, Any], size: int, precision: Precision) -> None:
    held = ranks.run(state_on_this_rank, fields, precision, ranks=size)
    stages = predicted_state(fields, size, precision)
    assert len(held) == size
    # Ranks of a stage lie behind one another.
    for rank, parts in enumerate(held):
        assert parts == pytest.approx(stages[rank * len(stages) // size], rel=0.01)
