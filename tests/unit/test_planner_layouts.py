"""Layouts of a run on a cluster: what a step is made of, which layouts work, which is taken."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.layout_rules import is_valid
from training.config import PRESET_DIR, PretrainConfig
from training.data_plan import DataPlan
from training.planner.cluster import Cluster, load_cluster
from training.planner.command import main
from training.planner.mix import step_of
from training.planner.plan import Plan, Refusal, describe, judge
from training.planner.search import Search, layouts, recomputing, search
from training.planner.work import MicroBatch
from training.run_plan import batch_sizes
from training.sample_groups import GroupKey, ListedGroup, SampleGroup

PAPER_540P = "step_video_30b_t2vi_540_s1"
SMALL = [
    "model.num_layers=4",
    "model.num_attention_heads=4",
    "model.attention_head_dim=64",
    "data.buckets=[17x256x256]",
    "data.global_batch_size=32",
]


@pytest.fixture(scope="module")
def paper() -> PretrainConfig:
    return load_config(PretrainConfig, PAPER_540P, (), PRESET_DIR)


@pytest.fixture(scope="module")
def paper_cluster() -> Cluster:
    return load_cluster("h800_step_video")


@pytest.fixture(scope="module")
def small() -> PretrainConfig:
    return load_config(PretrainConfig, None, SMALL)


@pytest.fixture(scope="module")
def found(small: PretrainConfig) -> Search:
    return search(small, load_cluster("h100", ("gpus=8", "memory_gib=6.05")), step_of(small, 64))


# What a step is made of.


@pytest.mark.parametrize(
    "preset", [PAPER_540P, "step_video_30b_t2i_256_s1", "step_video_30b_t2vi_192_s2", "tiny_t2vi_low"]
)
def test_a_step_has_the_samples_that_the_run_draws(preset: str) -> None:
    config = load_config(PretrainConfig, preset, (), PRESET_DIR)
    # Equally many samples in every bucket, which is what the planner assumes.
    groups: dict[GroupKey, SampleGroup] = {
        ("a", name): ListedGroup(np.arange(100 * number, 100 * number + 100))
        for number, name in enumerate(config.data.buckets or [])
    }
    drawn = DataPlan(groups, config.data, 0, "s", sizes=batch_sizes(config, groups, None))
    step = step_of(config, 256)
    samples = sum(batch.samples * count for batch, count in step.items())
    assert samples == pytest.approx(drawn.samples_per_step(), rel=1e-6)
    most = max(config.data.micro_batch_size * max(batch.tokens for batch in step), 1)
    assert max(batch.samples * batch.tokens for batch in step) <= most


def test_images_of_a_run_without_other_samples_are_whole_micro_batches() -> None:
    config = load_config(PretrainConfig, "step_video_30b_t2i_256_s1", (), PRESET_DIR)
    assert step_of(config, 256) == {MicroBatch(40, 256, 256): pytest.approx(375)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.buckets=null"], "data.buckets is null"),
        (["data.buckets=[1x64x64]", "data.images_per_video=1.0"], "no videos in data.buckets"),
        (["data.bucket_weights={17x64x64: 1}"], "bucket_weights"),
    ],
)
def test_sizes_that_nobody_knows_are_refused(change: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_of(load_config(PretrainConfig, None, [*SMALL, *change]), 64)


# One layout.


def test_the_papers_layout_works_at_about_its_speed(paper: PretrainConfig, paper_cluster: Cluster) -> None:
    plan = judge(paper, paper_cluster, step_of(paper, 256), paper.parallel)
    assert isinstance(plan, Plan)
    # Its emulator: 35.59 for the largest samples alone; measured: 32.
    assert 32 < plan.mfu_percent < 36.5
    assert plan.job.flops / (plan.seconds.total * 3000 * 989e12) == pytest.approx(plan.mfu_percent / 100)
    assert plan.gpu_hours == pytest.approx(plan.seconds.total * 23000 * 3000 / 3600)
    assert plan.cost is None


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"recompute_granularity": None, "recompute_num_layers": None}, "out of memory", r"needs 1\d\d\.\d GiB"),
        ({"tensor_model_parallel_size": 5}, "heads over tensor-parallel ranks", "does not divide"),
        ({"tensor_model_parallel_size": 12}, "tensor parallelism over nodes", "nodes of 8 GPUs .* groups of 12"),
        ({"context_parallel_size": 2}, "ranks hold no whole replicas", "16 ranks"),
        ({"pipeline_model_parallel_size": 5}, "layers over stages", "cannot be cut"),
    ],
)
def test_layouts_that_do_not_work_say_why(
    paper: PretrainConfig, paper_cluster: Cluster, change: dict[str, Any], kind: str, reason: str
) -> None:
    refusal = judge(paper, paper_cluster, step_of(paper, 256), replace(paper.parallel, **change))
    assert isinstance(refusal, Refusal)
    assert refusal.kind == kind
    assert re.search(reason, refusal.reason)


def test_fewer_layers_recomputed_are_faster_and_take_more_memory(paper: PretrainConfig, paper_cluster: Cluster) -> None:
    step = step_of(paper, 256)
    plans = [judge(paper, paper_cluster, step, recomputing(paper.parallel, layers)) for layers in (48, 44, 40, 36)]
    assert all(isinstance(plan, Plan) for plan in plans)
    for more, fewer in itertools.pairwise(plans):
        assert isinstance(more, Plan)
        assert isinstance(fewer, Plan)
        assert fewer.mfu_percent > more.mfu_percent
        assert fewer.peak.total > more.peak.total


# All layouts.


def test_every_layout_is_judged_once(small: PretrainConfig, found: Search) -> None:
    asked = [describe(layout) for layout in layouts(small, load_cluster("h100", ("gpus=8",)))]
    assert len(asked) == len(set(asked)) == len(found.plans) + len(found.refusals)


def test_plans_work_fit_and_are_ranked(small: PretrainConfig, found: Search) -> None:
    assert len(found.plans) > 10
    assert [plan.mfu_percent for plan in found.plans] == sorted((p.mfu_percent for p in found.plans), reverse=True)
    for plan in found.plans:
        assert is_valid(replace(small.layout(plan.job.cluster.gpus), parallel=plan.parallel))
        assert plan.peak.total <= plan.job.cluster.usable_bytes


def test_no_more_layers_are_recomputed_than_must_be(small: PretrainConfig, found: Search) -> None:
    cluster, step = load_cluster("h100", ("gpus=8", "memory_gib=6.05")), step_of(small, 64)
    tight = [plan for plan in found.plans if plan.parallel.recompute_num_layers]
    assert tight
    for plan in tight:
        fewer = recomputing(plan.parallel, (plan.parallel.recompute_num_layers or 0) - 1)
        refusal = judge(small, cluster, step, fewer, leave_idle=True)
        assert isinstance(refusal, Refusal)
        assert refusal.kind == "out of memory"


def test_the_simplest_is_near_the_best_and_none_near_it_is_simpler(found: Search) -> None:
    assert found.best is not None
    assert found.simplest is not None
    assert found.best is found.plans[0]
    near = [plan for plan in found.plans if plan.mfu_percent > found.best.mfu_percent - 1]
    assert found.simplest in near
    assert found.simplest.mechanisms == min(plan.mechanisms for plan in near)


def test_on_the_papers_cluster_the_simplest_is_the_papers_choice(paper: PretrainConfig, paper_cluster: Cluster) -> None:
    searched = search(paper, paper_cluster, step_of(paper, 256))
    assert searched.best is not None
    assert searched.simplest is not None
    assert describe(searched.simplest.parallel).startswith("TP8 SP ZeRO-1")
    assert searched.best.mfu_percent - searched.simplest.mfu_percent < 1


# The command.


def test_plan_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    arguments = ["--config", PAPER_540P, "--cluster", "h800_step_video", "--set", "price_per_gpu_hour=2", "--json"]
    assert main([*arguments, "--plot", str(plot), "training.steps=10", "optimizer.warmup_steps=1"]) == 0
    values = json.loads(capsys.readouterr().out)
    parts = sum(seconds for name, seconds in values["seconds"].items() if not name.startswith("hidden"))
    assert values["seconds_per_step"] == pytest.approx(parts)
    assert values["cost"] == pytest.approx(2 * 10 * parts * 3000 / 3600)
    (stage,) = values["memory_gib_by_stage"]
    assert stage["total"] == pytest.approx(sum(value for name, value in stage.items() if name != "total"))
    with Image.open(plot) as picture:
        assert len(picture.convert("RGB").getcolors(10**7) or []) > 10


def test_plan_of_all_layouts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {num_layers: 4, num_attention_heads: 4}\ndata: {buckets: [17x64x64], global_batch_size: 8}\n"
    )
    arguments = ["--config", str(config), "--cluster", "h100", "--set", "gpus=4", "--layouts", "all"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "best: " in text
    assert "simplest within 1 point: " in text
    assert re.search(r"refused \(\d+ layouts\):", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--cluster", "nowhere"], "neither a file nor a preset"),
        (["--config", "nothing"], "neither a file nor a preset"),
        (["--set", "gpus=0"], "gpus=0"),
        (["--set", "gpu_count=8"], "unknown field 'gpu_count'"),
        (["--text-tokens", "0"], "--text-tokens 0"),
        (["data.buckets=null"], "data.buckets is null"),
        (["--plot", "/nowhere/plan.png"], "there is no folder /nowhere"),
        (["--plot", "plan.xyz"], "must end in one of .png"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    assert run_command(main, ["--config", PAPER_540P, "--cluster", "h100", *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_layout_that_does_not_work_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", PAPER_540P, "--cluster", "h100", "--set", "gpus=60"]) == 2
    assert "ranks hold no whole replicas" in capsys.readouterr().out
