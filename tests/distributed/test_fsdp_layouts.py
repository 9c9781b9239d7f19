"""What Megatron-FSDP promises beside the numbers of one process: it keeps rows only, and its checkpoints are whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training.checkpoint import load_model_weights, step_folder
from training.fsdp import FullyShardedDiT
from training.layout_matrix.checkpoints import OTHER_SEED, cross_load, load_and_train, train_and_save
from training.layout_matrix.compare import QUANTITIES, assemble, compare, relative_error
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import LAYOUTS, STEPS, TOLERANCES, LayoutCase, Workload
from training.layout_matrix.worker import Report, build, micro_batches
from training.local_ranks import RankPool
from training.train_step import train_step

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
SHARDED = ("dp2_fsdp", "dp2_fsdp_optim", "dp2_fsdp_optim_grads")


@dataclass
class Holdings:
    """What a rank has in memory after a step."""

    parameters: int
    """Of the whole model."""
    optimized: int
    """Elements that its optimizer updates."""
    layer_weights: int
    """Elements of the DiT layers' weights, in the model's type, whole ones and rows."""


def hold(case: LayoutCase) -> Holdings:
    """On a rank: one step, then look."""
    session = build(case, Workload())
    session.train(1)
    (chunk,) = session.model
    assert isinstance(chunk, FullyShardedDiT)
    # Else the first gather of the next step is under way.
    chunk.module.synchronize_param_gather()
    raw = {name: main.orig_param for name, main in chunk.distributed_parameters().items()}  # type: ignore[attr-defined]
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for name, parameter in raw.items()
        if name.startswith("layers.")
    }
    optimized = sum(main.to_local().numel() for main in chunk.distributed_parameters().values())  # type: ignore[attr-defined]
    return Holdings(sum(parameter.numel() for parameter in raw.values()), optimized, sum(storages.values()) // 4)


@pytest.mark.parametrize("name", SHARDED)
def test_a_rank_keeps_what_its_strategy_leaves_it(name: str, ranks: RankPool) -> None:
    held = ranks.run(hold, BY_NAME[name], ranks=2)
    assert sum(each.optimized for each in held) == held[0].parameters
    for each in held:
        assert each.optimized < 0.6 * each.parameters
        # Only where the weights are cut too, whole ones are given up.
        assert (each.layer_weights == 0) == (name == "dp2_fsdp")


def test_a_refused_step_leaves_everything_as_it_was(ranks: RankPool) -> None:
    clean, refused = (ranks.run(train_after, BY_NAME["dp2_fsdp"], broken, ranks=2)[0] for broken in (False, True))
    assert refused == clean


def train_after(case: LayoutCase, broken: bool) -> list[float]:
    """On a rank: losses of two steps, before the second of which one may have met a NaN."""
    session = build(case, Workload())
    losses = session.train(1).losses
    if broken:
        batch = micro_batches(session.workload)[0]
        result = train_step(session.model, session.optimizer, [replace(batch, target=batch.target * torch.nan)])
        assert result.refused
    return losses + session.train(1).losses


def test_a_checkpoint_of_one_process_goes_on_in_rows(ranks: RankPool, tmp_path: Path) -> None:
    (cell,) = cross_load(ranks, tmp_path, [ONE_PROCESS], [BY_NAME["dp2_fsdp_optim_grads"]])
    assert not cell.wrong, cell


def test_the_same_layout_goes_on_bit_for_bit_in_bf16(ranks: RankPool, tmp_path: Path) -> None:
    case, workload = BY_NAME["dp2_fsdp"], Workload(dtype="bfloat16")
    unstopped = ranks.run(train_and_save, case, workload, str(tmp_path), ranks=2)
    resumed = ranks.run(load_and_train, case, workload, str(tmp_path), ranks=2)
    assert (resumed[0].losses, resumed[0].grad_norms) == (unstopped[0].losses, unstopped[0].grad_norms)
    for quantity in QUANTITIES:
        found, expected = assemble(resumed, quantity)[0], assemble(unstopped, quantity)[0]
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{quantity} of {name}")


def test_fp32_rows_behind_bf16_weights_reach_another_kind_of_optimizer(ranks: RankPool, tmp_path: Path) -> None:
    workload = Workload(dtype="bfloat16")
    unstopped = ranks.run(train_and_save, BY_NAME["dp2_fsdp"], workload, str(tmp_path), ranks=2)
    resumed = ranks.run(load_and_train, BY_NAME["dp2_zero1"], workload, str(tmp_path), ranks=2)
    for quantity in ("main_parameters", "ema"):
        found, expected = assemble(resumed, quantity)[0], assemble(unstopped, quantity)[0]
        for name, value in expected.items():
            # A lost fp32 digit would show as a bf16 step, 1e-3.
            assert relative_error(found[name], value) < 1e-5, (quantity, name)


def test_averages_alone_load_into_rows(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(train_and_save, BY_NAME["dp2_fsdp"], Workload(), str(tmp_path), ranks=2)
    expected = ranks.run(load_averages, ONE_PROCESS, str(tmp_path), ranks=1)[0]
    reports = ranks.run(load_averages, BY_NAME["dp2_fsdp"], str(tmp_path), ranks=2)
    assert compare(reports, expected).above(TOLERANCES["float32"]) == []


def load_averages(case: LayoutCase, folder: str) -> Report:
    """On a rank: only the averaged weights of a checkpoint, then one step with a fresh optimizer."""
    session = build(case, Workload(), init_seed=OTHER_SEED)
    load_model_weights(step_folder(Path(folder), STEPS), session.model, averaged=True)
    session.optimizer.reload_model_params()
    session.ema.restart()
    return session.train(1)
