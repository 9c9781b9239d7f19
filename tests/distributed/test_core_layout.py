"""The cuts that the tools make are those that ranks of the same layout really write."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from checkpoints_tools import core_layout
from checkpoints_tools.core_contents import CoreContents
from checkpoints_tools.core_layout import CoreLayout, Cut
from checkpoints_tools.models import KINDS
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig
from training import optimizer
from training.checkpoint import TrainState, save_checkpoint, step_folder
from training.config import PretrainConfig
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import LAYOUTS, LayoutCase, Workload
from training.layout_matrix.worker import build, model_config
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
HEAVY = [
    pytest.param(name, marks=pytest.mark.heavy)
    for name in ("tp4_cp2_all_gather", "pp4_dp2_zero1", "cp2_dp4_zero1_overlap", "dp5_zero1_overlap", "pp4")
]
CASES = ["tp2_pp2", "pp2_vpp2", "pp2_dp3_zero1_overlap", "tp2_sp_pp2_vpp2_dp2_zero1", *HEAVY]
SMALL_BUCKET = 20_000


def save(case: LayoutCase, folder: str, bucket: int | None = None) -> None:
    """On a rank: the untrained model of the matrix, with its optimizer and averages; `bucket`: elements of one."""
    settings = partial(DistributedDataParallelConfig, bucket_size=bucket)
    with patch.object(optimizer, "DistributedDataParallelConfig", settings):
        session = build(case, Workload())
    config = PretrainConfig(model=model_config(session.workload), parallel=case.config)
    save_checkpoint(Path(folder), session.model, session.optimizer, TrainState(), config, ema=session.ema)


def layout_of(case: LayoutCase) -> CoreLayout:
    dit = model_config(Workload())
    return CoreLayout(dit, case.config, KINDS["dit"].build(dit).shapes, case.data_parallel_size)


def states(case: LayoutCase) -> list[list[Cut]]:
    layout = layout_of(case)
    return [layout.state(name) for name in layout.names]


def assert_same_cuts(case: LayoutCase, folder: Path) -> None:
    layout, entries = layout_of(case), CoreContents(step_folder(folder, 0)).entries.values()
    assert {entry.part for entry in entries} == {"weights", "optimizer", "averages", "objects"}
    replicated = case.data_parallel_size * case.config.context_parallel_size > 1
    for entry in entries:
        if entry.part == "objects":
            continue
        cuts = layout.weight(entry.name) if entry.part == "weights" else layout.state(entry.name)
        expected = {(chunk.offsets, chunk.sizes): int(chunk.file.split("_")[2]) for chunk in entry.chunks}
        assert {(cut.offsets, cut.sizes) for cut in cuts} == expected.keys(), entry.fqn
        # What replicas hold alike they deal out among them when they save.
        if not replicated or (case.config.use_distributed_optimizer and entry.part != "weights"):
            assert {(cut.offsets, cut.sizes): cut.rank for cut in cuts} == expected, entry.fqn


@pytest.mark.parametrize("name", CASES)
def test_cuts_are_those_of_ranks_that_saved(name: str, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save, BY_NAME[name], str(tmp_path), ranks=BY_NAME[name].ranks)
    assert_same_cuts(BY_NAME[name], tmp_path)


def test_cuts_follow_the_buckets_of_large_models(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME["dp3_zero1_overlap"]
    before = states(case)
    ranks.run(save, case, str(tmp_path), SMALL_BUCKET, ranks=case.ranks)
    monkeypatch.setattr(core_layout, "_LEAST_BUCKET", SMALL_BUCKET)
    monkeypatch.setattr(core_layout, "_BUCKET_PER_REPLICA", 0)
    assert before != states(case)
    assert_same_cuts(case, tmp_path)


def test_a_layout_that_cannot_work_is_refused_by_its_reason() -> None:
    with pytest.raises(UserError, match=r"parallel.tensor_model_parallel_size=3, .*attention heads"):
        layout_of(LayoutCase("tp3", {"tensor_model_parallel_size": 3}))
    with pytest.raises(UserError, match="equal pieces"):
        layout_of(LayoutCase("pp3", vars(ParallelConfig(pipeline_model_parallel_size=3))))
