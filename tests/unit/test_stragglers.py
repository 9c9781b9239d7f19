"""Which rank is slow, told from gathered times alone."""

from __future__ import annotations

import random

import pytest
import torch

from training.fault_config import FaultConfig
from training.phases import PHASES
from training.rank_table import RankPlace
from training.stragglers import Probe, Straggler, find_stragglers

CONFIG = FaultConfig()


def grid(tp: int, dp: int, pp: int = 1) -> list[RankPlace]:
    """Ranks in megatron-core's order: tp fastest, then dp, then pp."""
    return [
        RankPlace(
            rank, f"host{rank // 8}", 1, {"tp": rank % tp, "cp": 0, "dp": rank // tp % dp, "pp": rank // tp // dp}
        )
        for rank in range(tp * dp * pp)
    ]


def usual(places: list[RankPlace]) -> dict[str, list[float]]:
    """A step of about 1 s with 3 % of noise; the first stage has half of the work of the second."""
    draw = random.Random(0)
    times = {phase: [0.001 * draw.uniform(0.5, 2) for _ in places] for phase in PHASES}
    times["forward_backward"] = [0.4 * (1 + place.coordinates["pp"]) * draw.uniform(0.97, 1.03) for place in places]
    times["reduce"] = [0.6 for _ in places]
    times["probe"] = [1e-4 * draw.uniform(0.97, 1.03) for _ in places]
    return times


def named(found: list[Straggler]) -> list[tuple[int, str, list[int]]]:
    return [(item.place.rank, item.phase, item.ranks) for item in found]


@pytest.mark.parametrize("places", [grid(1, 1), grid(1, 2), grid(8, 4), grid(2, 4, 2)])
def test_ranks_that_are_alike_are_not_named(places: list[RankPlace]) -> None:
    assert find_stragglers(usual(places), places, CONFIG) == []


@pytest.mark.parametrize("places", [grid(1, 2), grid(1, 64), grid(2, 4, 2)])
@pytest.mark.parametrize("phase", ["data", "forward_backward"])
def test_the_slow_rank_is_named_with_phase_and_ratio(places: list[RankPlace], phase: str) -> None:
    times = usual(places)
    times[phase][1] = 2 * times["forward_backward"][1]
    (found,) = find_stragglers(times, places, CONFIG)
    assert named([found]) == [(1, phase, [1])]
    if phase == "forward_backward":
        assert found.ratio == pytest.approx(2, rel=0.07)
        assert found.z_score is None or found.z_score > 10


def test_a_slow_tensor_parallel_group_is_named_as_one_and_the_probe_tells_its_slow_rank() -> None:
    places = grid(4, 4)
    times = usual(places)
    for rank in range(4, 8):
        times["forward_backward"][rank] *= 1.5
    times["probe"][6] *= 1.6
    assert [(phase, ranks) for _, phase, ranks in named(find_stragglers(times, places, CONFIG))] == [
        ("forward_backward", [4, 5, 6, 7]),
        ("probe", [6]),
    ]


def test_a_pipeline_stage_with_more_work_is_not_slow() -> None:
    places = grid(1, 2, 2)
    assert find_stragglers(usual(places), places, CONFIG) == []


def test_a_difference_that_costs_nothing_is_not_named() -> None:
    places = grid(1, 4)
    times = usual(places)
    times["data"][2] = 0.02  # twenty times the others, two percent of a step
    assert find_stragglers(times, places, CONFIG) == []


def test_the_probe_measures_something() -> None:
    assert 0 < Probe(torch.device("cpu")).take_seconds() < 1
