"""Weights go through every form and through ranks of several layouts and come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_cases import dit as golden_dit
from golden_released import with_weights
from round_trip import PAIRS, RESHARDED, golden_case, pair_trip, reshard_trip, whole_trip

from checkpoints_tools.reshard import Target
from megatron_video.parallel import destroy_parallel
from training.layout_matrix.table import Dtype
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed


def test_released_weights_come_back_through_ranks_of_two_layouts(ranks: RankPool, tmp_path: Path) -> None:
    trip, weights = whole_trip(ranks, tmp_path)
    assert (trip.before, trip.different) == (trip.after, [])
    case = golden_case()
    # Output in fp32 and bf16, and all gradients.
    try:
        golden_dit.run(case.meta, with_weights(case, dict(weights)), case.folder, case.name)
    finally:
        destroy_parallel()


@pytest.mark.parametrize(
    ("writer", "reader", "dtype"), [PAIRS[1], *(pytest.param(*pair, marks=pytest.mark.heavy) for pair in PAIRS[2:])]
)
def test_a_job_saves_what_it_loaded(writer: str, reader: str, dtype: Dtype, ranks: RankPool, tmp_path: Path) -> None:
    trip = pair_trip(ranks, tmp_path, writer, reader, dtype)
    assert trip.before == trip.after
    assert trip.before.weights != trip.before.state


@pytest.mark.heavy
@pytest.mark.parametrize(("writer", "target"), RESHARDED)
def test_the_tool_cuts_without_a_change(writer: str, target: Target, ranks: RankPool, tmp_path: Path) -> None:
    trip = reshard_trip(ranks, tmp_path, writer, target)
    assert trip.before == trip.after
