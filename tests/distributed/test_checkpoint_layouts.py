"""A checkpoint of any layout, with its optimizer, goes on in any other as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_worker import Numbers, load_and_train, load_weights, train_and_save
from distributed_ranks import RankPool

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
STEPS, MORE = 3, 2

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2_zero1": {"use_distributed_optimizer": True},
    "dp2_zero1_overlap": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
# Who wrote it: every kind of optimizer state and cut of the tensors at least once.
WRITERS = ["dp2", "dp2_zero1_overlap", "tp2_sp", "pp2_vpp2"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Numbers]]:
    """(writer, dtype) -> folder, and what the writer itself did after the save."""
    found = {}
    for dtype, writers in (("float32", WRITERS), ("bfloat16", ["dp2", "dp2_zero1"])):
        for name in writers:
            folder = tmp_path_factory.mktemp(f"{name}_{dtype}")
            arguments = (LAYOUTS[name], dtype, str(folder), STEPS, MORE)
            found[name, dtype] = folder, ranks.run(train_and_save, *arguments)[0]
    return found


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_goes_on_in_another_layout(
    writer: str, reader: str, ranks: RankPool, saved: dict[tuple[str, str], tuple[Path, Numbers]]
) -> None:
    folder, expected = saved[writer, "float32"]
    for numbers in ranks.run(load_and_train, LAYOUTS[reader], "float32", str(folder), STEPS, MORE):
        if reader == writer:
            assert numbers == expected
        np.testing.assert_allclose(numbers, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("reader", ["dp2", "dp2_zero1"])
@pytest.mark.parametrize("writer", ["dp2", "dp2_zero1"])
def test_fp32_weights_behind_bf16_ones_are_kept(
    writer: str, reader: str, ranks: RankPool, saved: dict[tuple[str, str], tuple[Path, Numbers]]
) -> None:
    folder, expected = saved[writer, "bfloat16"]
    # Both compute the same bf16 forward pass, so a lost fp32 digit would show as a bf16 step, 1e-3.
    numbers = ranks.run(load_and_train, LAYOUTS[reader], "bfloat16", str(folder), STEPS, MORE)[0]
    np.testing.assert_allclose(numbers, expected, rtol=TOLERANCE)


def test_weights_alone_load_into_any_layout(
    ranks: RankPool, saved: dict[tuple[str, str], tuple[Path, Numbers]]
) -> None:
    folder, expected = saved["tp2_sp", "float32"]
    for layout in LAYOUTS.values():
        numbers = ranks.run(load_weights, layout, "float32", str(folder), STEPS)[0]
        np.testing.assert_allclose(numbers[0], expected[0], rtol=TOLERANCE)
