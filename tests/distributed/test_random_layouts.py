"""Layouts, shapes, text masks, accumulation and dropout drawn at random: all that the rules let through must agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

from megatron_video.layout import Hardware, Layout
from megatron_video.layout_rules import is_valid
from megatron_video.parallel import ParallelConfig
from training.layout_matrix.compare import compare
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import TOLERANCES, LayoutCase, Workload
from training.layout_matrix.worker import model_config, train
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
MAX_RANKS = 8
# No shrinking: an example takes seconds, and its layout is readable as it is.
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Micro-batches of images and videos whose token counts divide by anything or nothing."""
    size = st.integers(1, 5)
    shapes = st.tuples(size, size, size, st.integers(1, 3))
    count = draw(st.sampled_from([1, 2, 4, 8]))
    return Workload(
        num_layers=draw(st.sampled_from([2, 4])),
        hidden_dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        shapes=tuple(draw(st.lists(shapes, min_size=count, max_size=count))),
        all_text_visible=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


@st.composite
def parallel_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a ParallelConfig; many sets of them are refused."""
    tensor, pipeline, context = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4), (1, 2, 4), (1, 2, 3, 4, 8)))
    assume(tensor * pipeline * context <= MAX_RANKS)
    granularity = draw(st.sampled_from([None, None, "full", "selective"]))
    modules = ["core_attn", "cross_attention", "mlp"]
    sharded, overlapped, sequence = (draw(st.sampled_from([True, False])) for _ in range(3))
    return {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": sequence and tensor > 1,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": draw(st.sampled_from([None, 2])) if pipeline > 1 else None,
        "context_parallel_size": context,
        "cp_comm_type": draw(st.sampled_from(["a2a", "all_gather"])),
        "use_distributed_optimizer": sharded,
        "overlap_grad_reduce": overlapped,
        "overlap_param_gather": sharded and overlapped,
        "recompute_granularity": granularity,
        "recompute_num_layers": draw(st.sampled_from([None, 1])) if granularity == "full" else None,
        "recompute_modules": draw(st.lists(st.sampled_from(modules), min_size=1, unique=True)),
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayoutCase, Workload]:
    """A layout that the rules allow for its work."""
    workload, fields = draw(workloads()), draw(parallel_fields())
    model_ranks = (
        fields["tensor_model_parallel_size"] * fields["pipeline_model_parallel_size"] * fields["context_parallel_size"]
    )
    replicas = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8) if size * model_ranks <= MAX_RANKS]))
    layout = Layout(
        ParallelConfig(**fields),
        model_config(workload),
        "fp32",
        world_size=model_ranks * replicas,
        micro_batches=len(workload.shapes),
        balance="auto",
        hardware=Hardware(),
    )
    assume(layout.world_size > 1)
    assume(is_valid(layout))
    return LayoutCase("drawn", fields, replicas), workload


def _check(ranks: RankPool, case: LayoutCase, workload: Workload) -> None:
    note(f"{case.ranks} ranks: {case.parallel}, {case.data_parallel_size} replicas; {workload}")
    reference = ranks.run(train, ONE_PROCESS, workload, ranks=1)[0]
    errors = compare(ranks.run(train, case, workload, ranks=case.ranks), reference)
    assert not errors.above(TOLERANCES["float32"]), errors


@settings(max_examples=4, derandomize=True, **COMMON)
@given(drawn=cases())
def test_drawn_layouts_agree_with_one_process(ranks: RankPool, drawn: tuple[LayoutCase, Workload]) -> None:
    _check(ranks, *drawn)


@pytest.mark.heavy
@settings(max_examples=150, **COMMON)
@given(drawn=cases())
def test_many_drawn_layouts_agree_with_one_process(ranks: RankPool, drawn: tuple[LayoutCase, Workload]) -> None:
    _check(ranks, *drawn)


@settings(max_examples=4, derandomize=True, **COMMON)
@given(workload=workloads())
def test_single_samples_add_up_to_their_micro_batches(ranks: RankPool, workload: Workload) -> None:
    """Accumulation alone: one process, the same samples in other micro-batches."""
    case = replace(ONE_PROCESS, single_samples=True)
    _check(ranks, case, workload)
