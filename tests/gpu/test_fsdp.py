"""Megatron-FSDP with NCCL: streams, gathers beside the computation, and memory that is given up for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_runs import SMALL, needs_cuda, needs_two_gpus

from megatron_video.dit import build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig, one_process
from training.layout_matrix.checkpoints import cross_load, cross_load_summary
from training.layout_matrix.runner import ONE_PROCESS, References, run_case
from training.layout_matrix.table import LAYOUTS, Dtype
from training.local_ranks import RankPool
from training.optimizer import wrap_data_parallel

pytestmark = [pytest.mark.gpu, needs_cuda]
SHARDED = {case.name: case for case in LAYOUTS if case.config.use_megatron_fsdp and case.ranks == 2}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with pytest.MonkeyPatch.context() as patch:
        # Tensor parallelism asks for a single queue, and whoever starts the tests may have set it.
        patch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        with RankPool(2, "cuda") as ranks:
            yield ranks


@needs_two_gpus
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHARDED)
def test_layout_gives_the_numbers_of_one_process(name: str, dtype: Dtype, pool: RankPool) -> None:
    outcome = run_case(pool, References(pool), SHARDED[name], dtype)
    assert outcome.wrong == [], (outcome.errors, outcome.failure)


@needs_two_gpus
def test_checkpoints_go_both_ways(pool: RankPool, tmp_path: Path) -> None:
    layouts = [ONE_PROCESS, SHARDED["dp2_fsdp"]]
    cells = cross_load(pool, tmp_path, layouts, layouts)
    assert not any(cell.wrong for cell in cells), cross_load_summary(cells)


def test_a_single_hardware_queue_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with one_process() as parallel:
        chunks = build_dit(SMALL, parallel, torch.bfloat16, device=torch.device("cuda"), init_seed=0)
        with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS=1"):
            wrap_data_parallel(chunks, ParallelConfig(use_megatron_fsdp=True))
