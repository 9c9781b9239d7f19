"""Validation gives one process's figures in every layout, and leaves the run as it was, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_shards import write_tiny_shards
from validation_worker import step_without_validation, validate

from training.ema import EMA, HostEMA
from training.layout_matrix.table import FSDP, LAYOUTS, ZERO1_OVERLAP, LayoutCase
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in LAYOUTS}
# Five and two samples of two sizes, in threes, at three times: 9 micro-batches of different cost, which neither
# replicas nor groups of pipeline stages divide.
SETTINGS = {"samples_per_bucket": 5, "micro_batch_size": 3, "time_quantiles": 3}
# fp32: another order of adding inside the model.
CLOSE = 1e-6
NAMES = ("dp2", "dp4_zero1_overlap", "dp2_fsdp", "tp2_sp", "pp2", "pp2_vpp2", "cp3_all_gather", "tp2_sp_pp2_cp2")
SHORT = ("dp4_zero1_overlap", "dp2_fsdp", "pp2_vpp2", "tp2_sp_pp2_cp2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_shards(tmp_path_factory.mktemp("held_out"), {"17x48x64": 9, "1x48x48": 2}))


@pytest.fixture(scope="module")
def single(ranks: RankPool, shards: str) -> dict[str, Any]:
    return ranks.run(validate, {}, shards, "float32", SETTINGS, ranks=1)[0]


def flat(losses: dict[str, Any]) -> np.ndarray:
    return np.array([losses["loss"], *losses["by_time"], *(x for row in losses["by_bucket"].values() for x in row)])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else (pytest.mark.heavy,)) for n in NAMES])
def test_figures_of_one_process_and_nothing_moved(
    name: str, ranks: RankPool, shards: str, single: dict[str, Any]
) -> None:
    case = BY_NAME[name]
    reports = ranks.run(validate, case.parallel, shards, "float32", SETTINGS, ranks=case.ranks)
    for report in reports:
        for weights in ("first", "trained", "averaged"):
            assert flat(report[weights]) == pytest.approx(flat(single[weights]), rel=CLOSE)
        assert report["moved"]
        assert report["restored"]
        assert report["next"] == pytest.approx(single["next"], rel=1e-5)


def test_what_is_compared_differs(single: dict[str, Any]) -> None:
    """Layouts would also agree if weights, times and buckets had no effect."""
    figures = np.concatenate([flat(single[weights]) for weights in ("first", "trained", "averaged")])
    assert len(figures) == 3 * (1 + 3 + 2 * 3)
    assert len({round(figure, 4) for figure in figures}) > len(figures) * 0.9


@pytest.mark.parametrize(
    "case",
    [
        LayoutCase("zero1", ZERO1_OVERLAP, 2),
        LayoutCase("fsdp", FSDP, 2),
        LayoutCase("replicated", {}, 2),
    ],
    ids=lambda case: case.name,
)
def test_bf16_weights_come_back_bit_for_bit(case: LayoutCase, ranks: RankPool, shards: str) -> None:
    reports = ranks.run(validate, case.parallel, shards, "bfloat16", SETTINGS, ranks=2)
    undisturbed = ranks.run(step_without_validation, case.parallel, shards, "bfloat16", ranks=2)
    for report, step in zip(reports, undisturbed, strict=True):
        assert report["moved"]
        assert report["restored"]
        assert report["next"] == step
        assert report["averaged"]["loss"] != report["trained"]["loss"]


def test_nothing_is_dropped_out(ranks: RankPool, shards: str, single: dict[str, Any]) -> None:
    report = ranks.run(validate, {}, shards, "float32", SETTINGS, EMA, 0.3, ranks=1)[0]
    assert report["first"] == single["first"]
    assert report["trained"] != single["trained"]


@pytest.mark.heavy
@pytest.mark.parametrize("parallel", [ZERO1_OVERLAP, FSDP], ids=["zero1", "fsdp"])
def test_averages_in_host_memory_change_places_too(parallel: dict[str, Any], ranks: RankPool, shards: str) -> None:
    reports = ranks.run(validate, parallel, shards, "bfloat16", SETTINGS, HostEMA, ranks=2)
    expected = ranks.run(validate, parallel, shards, "bfloat16", SETTINGS, EMA, ranks=2)
    for report, other in zip(reports, expected, strict=True):
        assert report["moved"]
        assert report["restored"]
        assert (report["averaged"], report["next"]) == (other["averaged"], other["next"])


def test_more_replicas_than_work(ranks: RankPool, shards: str) -> None:
    """Two micro-batches for four replicas: those without one wait for nobody."""
    few = {"samples_per_bucket": 1, "time_quantiles": 1}
    reports = ranks.run(validate, ZERO1_OVERLAP, shards, "float32", few, ranks=4)
    expected = ranks.run(validate, {}, shards, "float32", few, ranks=1)[0]
    for report in reports:
        assert flat(report["averaged"]) == pytest.approx(flat(expected["averaged"]), rel=CLOSE)
