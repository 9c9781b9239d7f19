"""A checkpoint of any layout, with its optimizer and EMA, goes on in any other as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.checkpoint import load_model_weights, step_folder
from training.layout_matrix.checkpoints import (
    OTHER_SEED,
    checkpoint_cases,
    cross_load,
    cross_load_summary,
    cross_load_table,
    load_and_train,
    train_and_save,
)
from training.layout_matrix.compare import QUANTITIES, assemble, compare, relative_error
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import LAYOUTS, STEPS, TOLERANCES, LayoutCase, Workload
from training.layout_matrix.worker import Report, build
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
FP32 = TOLERANCES["float32"]


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.heavy)], ids=["short", "whole"])
def test_every_layout_goes_on_from_every_other(short: bool, ranks: RankPool, tmp_path: Path) -> None:
    writers, readers = checkpoint_cases(short)
    cells = cross_load(ranks, tmp_path, writers, readers)
    print(f"\n{cross_load_table(cells)}")
    assert len(cells) == len(writers) * len(readers)
    assert not any(cell.wrong for cell in cells), cross_load_summary(cells)


@pytest.mark.parametrize("name", ["one_process", "dp2_zero1", "tp2_sp"])
def test_the_same_layout_goes_on_bit_for_bit(name: str, ranks: RankPool, tmp_path: Path) -> None:
    case, workload = BY_NAME[name], Workload()
    unstopped = ranks.run(train_and_save, case, workload, str(tmp_path), ranks=case.ranks)
    resumed = ranks.run(load_and_train, case, workload, str(tmp_path), ranks=case.ranks)
    assert (resumed[0].losses, resumed[0].grad_norms) == (unstopped[0].losses, unstopped[0].grad_norms)
    for quantity in QUANTITIES:
        found, expected = assemble(resumed, quantity)[0], assemble(unstopped, quantity)[0]
        for tensor, value in expected.items():
            np.testing.assert_array_equal(found[tensor], value, err_msg=f"{quantity} of {tensor}")


@pytest.mark.parametrize(("writer", "reader"), [("dp2", "dp2_zero1"), ("dp2_zero1", "dp2")])
def test_fp32_copies_and_averages_of_bf16_weights_are_kept(
    writer: str, reader: str, ranks: RankPool, tmp_path: Path
) -> None:
    workload = Workload(dtype="bfloat16")
    unstopped = ranks.run(train_and_save, BY_NAME[writer], workload, str(tmp_path), ranks=2)
    resumed = ranks.run(load_and_train, BY_NAME[reader], workload, str(tmp_path), ranks=2)
    # Both compute the same bf16 forward pass, so a lost fp32 digit would show as a bf16 step, 1e-3.
    for quantity in ("main_parameters", "ema"):
        found, expected = assemble(resumed, quantity)[0], assemble(unstopped, quantity)[0]
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-5, (quantity, name)


def test_weights_alone_load_into_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    workload, folder = Workload(), str(tmp_path)
    ranks.run(train_and_save, BY_NAME["tp2_sp_dp2_zero1"], workload, folder, ranks=4)
    losses = []
    for averaged in (False, True):
        expected = ranks.run(load_weights, ONE_PROCESS, workload, folder, averaged, ranks=1)[0]
        losses.append(expected.losses)
        for name in ("tp2_sp", "pp2_vpp2", "dp2_zero1"):
            reports = ranks.run(load_weights, BY_NAME[name], workload, folder, averaged, ranks=2)
            errors = compare(reports, expected)
            assert max(errors.loss, errors.parameters.error) < FP32.parameters, (name, errors)
    assert losses[0] != losses[1]


def load_weights(case: LayoutCase, workload: Workload, folder: str, averaged: bool) -> Report:
    """On a rank: only the weights of a checkpoint, then one step with a fresh optimizer."""
    session = build(case, workload, init_seed=OTHER_SEED)
    load_model_weights(step_folder(Path(folder), STEPS), session.model, averaged)
    session.optimizer.reload_model_params()
    return session.train(1)
