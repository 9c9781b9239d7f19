"""Activations as the planner has them, against what autograd keeps on the ranks of 24 layouts."""

from __future__ import annotations

from typing import Any

import pytest
from planner_activations import kept_on_this_rank, predicted_bytes

from megatron_video.parallel import ParallelConfig
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed

CUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP4 SP": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "CP2 a2a": {"context_parallel_size": 2},
    "CP4 all_gather": {"context_parallel_size": 4, "cp_comm_type": "all_gather"},
    "TP2 SP CP2 a2a": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "none": {},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "two layers": {"recompute_granularity": "full", "recompute_num_layers": 2},
}


@pytest.mark.parametrize("cut", CUTS)
def test_activations_are_what_autograd_keeps(ranks: RankPool, cut: str) -> None:
    size = ParallelConfig(**CUTS[cut]).model_parallel_size
    kept = ranks.run(kept_on_this_rank, CUTS[cut], list(RECOMPUTED.values()), 2, ranks=size)
    predicted = [predicted_bytes(ParallelConfig(**CUTS[cut], **again), 2) for again in RECOMPUTED.values()]
    assert len(kept) == size
    for of_rank in kept:
        assert of_rank == pytest.approx(predicted, rel=0.005)
