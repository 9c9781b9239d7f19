"""Layout invariance: three training steps give the numbers of one process, whatever the layout (1e-5 in fp32)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from distributed_ranks import RankPool
from layout_worker import Report, train

TOLERANCE = 1e-5

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2_sp_recompute": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_num_layers": -1},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
    "dp2_overlap": {"overlap_grad_reduce": True},
    "dp2_zero1": {"use_distributed_optimizer": True},
    "dp2_zero1_overlap": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one_process() -> Iterator[Report]:
    pool = RankPool(1)
    yield pool.run(train, {})[0]
    pool.close()


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(name: str, two_ranks: RankPool, one_process: Report) -> None:
    reports = two_ranks.run(train, LAYOUTS[name])
    for report in reports:
        np.testing.assert_allclose(report.losses, one_process.losses, rtol=TOLERANCE)
        np.testing.assert_allclose(report.grad_norms, one_process.grad_norms, rtol=TOLERANCE)
    names = {part for report in reports for part in report.parts}
    assert names == set(one_process.parts)
    for parameter in sorted(names):
        expected = one_process.parts[parameter]
        assert relative_error(_whole(reports, parameter, "value"), expected.value) < TOLERANCE, parameter
        gradient = _whole(reports, parameter, "gradient")
        if gradient is not None:
            assert relative_error(gradient, expected.gradient) < TOLERANCE, f"gradient of {parameter}"


def test_training_moved_the_parameters(one_process: Report) -> None:
    """The comparison above would also pass if nothing were trained."""
    assert one_process.losses[0] != one_process.losses[2]
    assert all(part.gradient is not None and part.gradient.any() for part in one_process.parts.values())


def relative_error(actual: np.ndarray | None, expected: np.ndarray | None) -> float:
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _whole(reports: list[Report], name: str, field: str) -> np.ndarray | None:
    """The parameter (or gradient) put together from its tensor-parallel cuts; copies must be equal."""
    holders = {report.tensor_rank: report for report in reports if name in report.parts}
    pieces = [getattr(holders[rank].parts[name], field) for rank in sorted(holders)]
    if pieces[0] is None:
        return None
    dimension = holders[0].parts[name].partition_dim
    if dimension >= 0:
        return np.concatenate(pieces, axis=dimension)
    for piece in pieces[1:]:
        np.testing.assert_array_equal(piece, pieces[0], err_msg=name)
    return pieces[0]
