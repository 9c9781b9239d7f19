"""The rank grid is the picture everyone refers to: it must be the order megatron-core really uses."""

from __future__ import annotations

import inspect

import pytest
from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

from megatron_video.parallel import ParallelConfig, rank_grid

ORDER = inspect.signature(initialize_model_parallel).parameters["order"].default


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 1), (2, 3, 2), (1, 2, 4), (4, 2, 3)])
def test_rank_grid_is_the_order_of_megatron_core(tp: int, pp: int, dp: int) -> None:
    grid = rank_grid(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp), tp * pp * dp)
    assert grid.shape == (pp, dp, 1, tp)
    ranks = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order=ORDER)
    for axis, name in enumerate(("pp", "dp", "cp", "tp")):
        groups = grid.movedim(axis, -1).flatten(0, -2).tolist()
        assert sorted(groups) == sorted(ranks.get_ranks(name)), name
