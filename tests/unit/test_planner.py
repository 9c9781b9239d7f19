"""The planner against figures that others published, and against what our own model really has and keeps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from planner_activations import TINY, kept_by_autograd, predicted_bytes
from test_flops import TABLE_3

from megatron_video import device
from megatron_video.cli import run_command
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.planner import fit, published, table2, write_tables
from training.planner.claims import claims
from training.planner.cluster import CLUSTER_DIR, Cluster, load_cluster
from training.planner.command import main
from training.planner.job import Job
from training.planner.memory import layers_under_way, peak_memory
from training.planner.shape import ModelShape
from training.planner.step_time import Seconds, step_seconds
from training.planner.tables import published_speeds, table_2
from training.planner.work import MicroBatch, backward_work, forward_work, model_flops


@pytest.fixture(scope="module")
def paper_cluster() -> Cluster:
    return table2.table_2_cluster()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    destroy_parallel(keep_distributed=True)
    initialize_parallel(ParallelConfig(), seed=1, device_info=device.initialize())
    yield
    destroy_parallel(keep_distributed=True)


# Table 3.


@pytest.mark.parametrize(("frames", "height", "width", "tflops"), TABLE_3)
def test_plan_flops_is_table_3(
    capsys: pytest.CaptureFixture[str], frames: int, height: int, width: int, tflops: float
) -> None:
    sizes = ["--frames", str(frames), "--height", str(height), "--width", str(width)]
    assert main(["flops", *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tflops_per_sample"] == pytest.approx(tflops, abs=0.01)


def test_plan_flops_of_a_preset_goes_by_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--frames", "17", "--height", "48", "--width", "64", "--text-tokens", "9"]
    assert main(["flops", *sizes, "--config", "demo", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["latent_shape"] == [3, 3, 4]
    assert values["tflops_per_sample"] * 1e12 == pytest.approx(training_flops(6, 160, 36, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--frames", "16"], "frames=16"), (["--width", "100"], "width=100"), (["--text-tokens", "0"], "--text-tokens 0")],
)
def test_plan_flops_refuses_other_sizes(capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    sizes = ["flops", "--frames", "17", "--height", "48", "--width", "64", *change]
    assert run_command(main, sizes) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("samples", "tokens", "text"), [(1, 75888, 256), (3, 256, 77), (2, 8640, 320)])
def test_the_work_of_blocks_is_the_cost_model(samples: int, tokens: int, text: int) -> None:
    flops = model_flops(ModelShape.of(DiTConfig()), MicroBatch(samples, tokens, text))
    assert flops == pytest.approx(samples * training_flops(48, 6144, tokens, text), rel=1e-12)


# Table 2 and the paper's text.


def test_every_row_of_table_2_is_within_two_points(paper_cluster: Cluster) -> None:
    rows = table_2(paper_cluster).rows
    assert len(rows) == 9
    assert sum(not row["fitted"] for row in rows) == 6
    assert max(abs(row["residual"]) for row in rows) < 2


def test_rows_of_table_2_that_differ_by_a_point_keep_their_order(paper_cluster: Cluster) -> None:
    rows = table_2(paper_cluster).rows
    apart = [(a, b) for a, b in itertools.permutations(rows, 2) if a["paper_mfu"] - b["paper_mfu"] > 1]
    assert len(apart) > 10
    assert [(a["layout"], b["layout"]) for a, b in apart if a["planner_mfu"] <= b["planner_mfu"]] == []


def test_fitted_constants_are_those_in_the_files(paper_cluster: Cluster) -> None:
    for name, value in fit.fit_table_2(paper_cluster).items():
        assert getattr(paper_cluster.efficiency, name) == pytest.approx(value, abs=0.001), name
    assert fit.fit_wan_attention() == pytest.approx(published.WAN_ATTENTION, abs=0.001)


def test_all_layouts_of_table_2_fill_the_same_memory(paper_cluster: Cluster) -> None:
    # The emulator recomputed as few layers as fit. The one left out would need half layers, as printed.
    rows = [row for row in table_2(paper_cluster).rows if row["layout"] != "TP4 CP1 PP4 VPP24"]
    memory = [row["state_and_activations_gib"] for row in rows]
    assert len(rows) == 8
    assert max(memory) / min(memory) < 1.25


def test_memory_and_traffic_that_the_paper_tells(paper_cluster: Cluster) -> None:
    found = claims(paper_cluster)
    values = {claim.what: claim.planner for claim in found}
    assert values["activations of a 540P sample of 204 frames at TP8 + SP"] == pytest.approx(120, rel=0.1)
    assert values["weights and gradients at TP8, the most that PP can save"] == pytest.approx(20, rel=0.1)
    shares = [claim.planner for claim in found if claim.what.endswith("not overlapped")]
    assert len(shares) == 4
    assert min(shares) > 30


# Others' speeds.


def test_published_speeds_are_within_ten_percent_or_say_why_not() -> None:
    rows = [row for row in published_speeds().rows if not row["fitted"]]
    assert len(rows) == 4
    outside = [row["run"] for row in rows if abs(row["residual_percent"]) > 10]
    assert outside == [row["run"] for row in rows if row["remark"]] == ["DFM Wan 14B, FSDP alone"]


def test_the_tables_in_the_docs_are_of_this_planner() -> None:
    assert write_tables.OUT.read_text(encoding="utf-8") == write_tables.page()


# Our own model.


def test_parameters_of_the_30b() -> None:
    assert ModelShape.of(DiTConfig()).parameters.total == 29_342_478_400


@pytest.mark.parametrize("additional", [False, True])
@pytest.mark.usefixtures("one_rank")
def test_parameters_are_those_of_the_model(additional: bool) -> None:
    config = replace(TINY, use_additional_conditions=additional, patch_size=2)
    (model,) = build_dit(config, ParallelConfig(), torch.float32, device=torch.device("meta"))
    parameters = list(model.parameters())
    counted = ModelShape.of(config).parameters
    cut = sum(p.numel() for p in parameters if getattr(p, "tensor_model_parallel", False))
    assert (counted.cut, counted.total) == (cut, sum(p.numel() for p in parameters))


RECOMPUTED: list[dict[str, Any]] = [
    {},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "selective", "recompute_modules": ["cross_attention"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "cross_attention", "mlp"]},
    {"recompute_granularity": "full", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_num_layers": 3},
    {"recompute_granularity": "full"},
]


@pytest.mark.parametrize("recompute", RECOMPUTED, ids=lambda fields: "-".join(map(str, fields.values())) or "none")
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.usefixtures("one_rank")
def test_activations_are_what_autograd_keeps(recompute: dict[str, Any], samples: int) -> None:
    # Under layouts of several ranks: tests/distributed/test_planner_activations.py.
    parallel = ParallelConfig(**recompute)
    assert predicted_bytes(parallel, samples) == pytest.approx(kept_by_autograd(parallel, samples), rel=0.002)


# Schedules and links.


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(2, 2, 8), (4, 3, 8), (4, 12, 4), (2, 24, 4)])
def test_micro_batches_under_way_are_megatron_cores(
    monkeypatch: pytest.MonkeyPatch, stages: int, chunks: int, micro_batches: int
) -> None:
    from megatron.core.pipeline_parallel import schedules

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks)
    shape = replace(ModelShape.of(TINY), num_layers=stages * chunks)
    for stage in range(stages):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda stage=stage: stage)
        total, _, warmup, _ = schedules.get_pp_rank_microbatches(micro_batches, chunks, stages, False)
        parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
        job = Job(shape, parallel, _cluster(gpus=stages), {MicroBatch(1, 16): float(micro_batches)})
        assert layers_under_way(job, stage) == min(total, warmup + 1)


def test_plain_stages_hold_as_many_micro_batches_as_stages_behind_them() -> None:
    job = Job(
        ModelShape.of(TINY), ParallelConfig(pipeline_model_parallel_size=4), _cluster(gpus=4), {MicroBatch(1, 16): 9}
    )
    assert [layers_under_way(job, stage) for stage in range(4)] == [4, 3, 2, 1]
    few = replace(job, step={MicroBatch(1, 16): 2})
    assert [layers_under_way(few, stage) for stage in range(4)] == [2, 2, 2, 1]


def test_links_of_collectives() -> None:
    cluster = _cluster(gpus=64)
    # 100 GB/s inside a node of 8, 10 GB/s of every device between nodes.
    assert cluster.gather_seconds(8e9, 8, 1) == pytest.approx(7e9 / 100e9)
    assert cluster.gather_seconds(8e9, 8, 8) == pytest.approx(7e9 / 10e9)
    # Two members in a node share the way out.
    assert cluster.gather_seconds(8e9, 8, 4) == pytest.approx(7e9 / 20e9)
    assert cluster.exchange_seconds(8e9, 8, 1) == pytest.approx(7e9 / 100e9)
    assert cluster.exchange_seconds(8e9, 8, 4) == pytest.approx(6e9 / 10e9)
    assert cluster.gather_seconds(8e9, 1, 8) == 0
    # Ranks 6, 8 and 10 of groups of three are in two nodes.
    assert cluster.gather_seconds(9e9, 3, 2) == pytest.approx(6e9 / 10e9)
    assert cluster.send_seconds(1e9, 2, 4) == pytest.approx(1e9 / 100e9)
    assert cluster.send_seconds(1e9, 4, 4) == pytest.approx(1e9 / 10e9)
    # NVLink of 72 GPUs, of which a job has 32.
    assert replace(cluster, gpus=32, gpus_per_node=72).gather_seconds(32e9, 32, 1) == pytest.approx(31e9 / 100e9)


def test_tensor_and_context_parallel_ranks_share_the_work() -> None:
    shape, batch = ModelShape.of(DiTConfig()), MicroBatch(1, 75888)
    cut = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True, context_parallel_size=3)
    for work_of in (forward_work, backward_work):
        whole, part = work_of(shape, batch, ParallelConfig()), work_of(shape, batch, cut)
        for branch, work in whole.items():
            assert part[branch].gemm_flops == pytest.approx(work.gemm_flops / 12)
            assert part[branch].attention_flops == pytest.approx(work.attention_flops / 12)
            assert part[branch].moved_bytes == pytest.approx(work.moved_bytes / 12)


def test_hidden_parts_do_not_count() -> None:
    assert Seconds(gemm=1, bubble=2, hidden_pipeline=8, hidden_data_parallel=16).total == 3


def test_sharding_shares_the_models_state() -> None:
    def memory(**fields: bool) -> Any:
        parallel = ParallelConfig(**fields)
        (found,) = peak_memory(Job(ModelShape.of(TINY), parallel, _cluster(gpus=4), {MicroBatch(1, 64): 4.0}, ema=True))
        return found

    plain, zero, fsdp = memory(), memory(use_distributed_optimizer=True), memory(use_megatron_fsdp=True)
    parameters = ModelShape.of(TINY).parameters.total
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert (zero.weights, zero.gradients, zero.optimizer, zero.ema) == (
        2 * parameters, 4 * parameters, 3 * parameters, parameters,
    )  # fmt: skip
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (parameters / 2, parameters, 3 * parameters)


# Descriptions of clusters.


@pytest.mark.parametrize("path", sorted(CLUSTER_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_cluster_files_are_read(path: Path) -> None:
    assert load_cluster(path.stem).peak("bf16") > 9e14


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gpus=0", "gpus=0 must be above 0"),
        ("efficiency.gemm=1.2", "gemm=1.2 must lie above 0"),
        ("peak_tflops={fp32: 67}", "must have bf16"),
        ("hidden_tensor_parallel=2", "hidden_tensor_parallel=2"),
        ("reserved_gib=100", "reserved_gib=100"),
        ("nvlink=3", "unknown field 'nvlink'"),
    ],
)
def test_clusters_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_cluster("h100", (override,))


def test_fp8_halves_no_more_than_its_share_of_the_products() -> None:
    cluster = load_cluster("h100", ("gpus=1", "efficiency.gemm_fp8=0.35"))
    job = Job(ModelShape.of(DiTConfig()), ParallelConfig(), cluster, {MicroBatch(1, 2880): 1.0})
    bf16, fp8, half = (step_seconds(replace(job, fp8_share=share)) for share in (0.0, 1.0, 0.5))
    # Half the efficiency of twice the peak.
    assert fp8.gemm == pytest.approx(bf16.gemm, rel=1e-3)
    faster = replace(job, cluster=load_cluster("h100", ("gpus=1", "efficiency.gemm_fp8=0.7")), fp8_share=0.5)
    assert step_seconds(faster).gemm == pytest.approx(0.75 * bf16.gemm, rel=1e-3)
    assert half.attention == fp8.attention == bf16.attention


def test_a_peak_that_is_not_given_is_asked_for() -> None:
    cluster = _cluster(gpus=1)
    job = Job(ModelShape.of(TINY), ParallelConfig(), cluster, {MicroBatch(1, 16): 1.0}, fp8_share=1.0)
    with pytest.raises(UserError, match="peak_tflops has bf16 and not fp8"):
        step_seconds(job)


def _cluster(gpus: int) -> Cluster:
    """Round numbers."""
    efficiency = {"gemm": 1.0, "attention": 1.0, "hbm": 1.0, "nvlink": 1.0, "nic": 1.0}
    return Cluster(
        gpu="test", gpus=gpus, memory_gib=80, peak_tflops={"bf16": 1000}, hbm_gbps=1000, nvlink_gbps=100, nic_gbps=10,
        efficiency=efficiency,  # type: ignore[arg-type]
    )  # fmt: skip
