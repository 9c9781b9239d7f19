"""What a dry run says of every rank, against what ranks build: names, shapes, bytes, groups, and the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dry_run_ranks import held_on_this_rank
from planner_activations import TINY
from planner_state import state_on_this_rank
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_video.layout import Precision
from megatron_video.parallel import ParallelConfig
from training.checkpoint import step_folder
from training.dry_run.job_views import JobViews, build_views
from training.dry_run.rank_view import Tensors
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed

ZERO = {"use_distributed_optimizer": True}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], int, Precision]] = {
    "DP2": ({}, 2, "bf16"),
    "DP3 ZeRO": (ZERO, 3, "bf16"),
    "DP4 ZeRO fp32": (ZERO, 4, "fp32"),
    "TP2 SP DP2 ZeRO": ({**TP2_SP, **ZERO}, 4, "bf16"),
    "TP2 SP PP2 DP2 ZeRO": ({**TP2_SP, **PP2, **ZERO}, 8, "bf16"),
    "PP2 VPP2 DP2 ZeRO": ({**PP2, "virtual_pipeline_model_parallel_size": 2, **ZERO}, 4, "bf16"),
    "CP2 DP2 ZeRO": ({"context_parallel_size": 2, **ZERO}, 4, "bf16"),
    "TP2 CP2 PP2": ({**TP2_SP, **PP2, "context_parallel_size": 2}, 8, "fp32"),
}


def views_of(fields: dict[str, Any], size: int, precision: Precision = "bf16") -> JobViews:
    return build_views(Tensors(TINY, ParallelConfig(**fields), precision, ema=True), size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_holds_what_its_view_says(ranks: RankPool, name: str) -> None:
    fields, size, precision = LAYOUTS[name]
    views = views_of(fields, size, precision)
    held = ranks.run(held_on_this_rank, fields, ranks=size)
    state = ranks.run(state_on_this_rank, fields, precision, ranks=size)
    said = views.ranks
    assert [facts.rank for facts in said] == list(range(size))
    for facts, (chunks, groups), parts in zip(said, held, state, strict=True):
        at = facts.coordinates
        view = views.views[at.pp, at.tp]
        assert [{n: p.shape for n, p in chunk.parameters.items()} for chunk in view.chunks] == chunks
        assert {axis: views.group(axis, at) for axis in groups} == groups
        # Byte for byte: padding of the gradient buffers too.
        assert {name: getattr(facts, name) for name in parts} == parts


def test_megatron_fsdp_has_the_same_parameters(ranks: RankPool) -> None:
    fields = {"use_megatron_fsdp": True}
    views = views_of(fields, 2)
    assert views.built == 2
    (chunks, _), _ = ranks.run(held_on_this_rank, fields, ranks=2)
    assert [{n: p.shape for n, p in chunk.parameters.items()} for chunk in views.views[0, 0].chunks] == chunks
    whole = views_of({}, 2)
    for cut, full in zip(views.ranks, whole.ranks, strict=True):
        assert cut.optimizer == pytest.approx(full.optimizer / 2, abs=12)
        assert cut.weights == pytest.approx(full.weights / 2, abs=1)


@pytest.mark.parametrize("name", ["DP3 ZeRO", "TP2 SP PP2 DP2 ZeRO"])
def test_predicted_checkpoint_is_the_one_that_ranks_write(ranks: RankPool, tmp_path: Path, name: str) -> None:
    fields, size, _ = LAYOUTS[name]
    ranks.run(held_on_this_rank, fields, str(tmp_path), ranks=size)
    folder = step_folder(tmp_path, 1)
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    written = {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    views = views_of(fields, size)
    assert {name: (sized.shape, sized.dtype) for name, sized in views.stored_with_optimizer.items()} == written
    files = sum(path.stat().st_size for path in folder.iterdir())
    # Beside the tensors: their list, and headers of what each rank writes, which weigh in a model as small as this.
    assert views.checkpoint_bytes < files < 1.5 * views.checkpoint_bytes
