"""Scaling curves of the planner."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_video.config_io import load_config
from training.config import PRESET_DIR, PretrainConfig
from training.planner.cluster import load_cluster
from training.planner.command import main
from training.planner.mix import step_of
from training.planner.plan import Plan, judge
from training.planner.scale import Scaling, batch_of, gpu_counts, scaling
from training.planner.scale_pages import paper_curriculum, published_section
from training.planner.search import fastest_by_size, search
from training.planner.step_time import Seconds
from training.planner.write_tables import OUT

STAGE = "step_video_30b_t2vi_192_s1"


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return load_config(PretrainConfig, STAGE, (), PRESET_DIR)


@pytest.fixture(scope="module")
def curves(config: PretrainConfig) -> Scaling:
    return scaling(config, load_cluster("h800_step_video"), [8, 64, 3000, 10240], 256, all_layouts=False)


def test_numbers_of_gpus() -> None:
    assert gpu_counts("8..10240", 3000)[-4:] == [3000, 4096, 8192, 10240]
    assert gpu_counts("8..64", 3000) == [8, 16, 32, 64]
    assert gpu_counts("64, 8", 3000) == [8, 64]


def test_the_batch_grows_in_whole_draws(config: PretrainConfig) -> None:
    cluster = load_cluster("h800_step_video")
    for gpus in (8, 100, 3000):
        batch = batch_of(config, cluster, gpus, "weak")
        assert batch % config.data.samples_per_draw == 0
        assert abs(batch - config.data.global_batch_size * gpus / 3000) <= config.data.samples_per_draw
        assert batch_of(config, cluster, gpus, "strong") == config.data.global_batch_size


def test_weak_scaling_loses_to_the_slowest_and_strong_ends_with_the_batch(curves: Scaling) -> None:
    weak = [row for row in curves.rows("weak") if row["step_seconds"]]
    assert [row["efficiency"] for row in weak] == sorted((row["efficiency"] for row in weak), reverse=True)
    assert weak[0]["efficiency"] == 1
    strong = curves.rows("strong")
    assert strong[-1]["step_seconds"] is None
    assert strong[-1]["limit"] == "more replicas than micro-batches"


def test_both_curves_meet_where_the_batch_is_as_configured(curves: Scaling) -> None:
    strong, weak = (next(row for row in curves.rows(mode) if row["gpus"] == 3000) for mode in ("strong", "weak"))
    assert strong["step_seconds"] == pytest.approx(weak["step_seconds"])
    assert strong["tokens_per_second"] == pytest.approx(weak["tokens_per_second"])


def test_parts_of_a_step_are_the_step(curves: Scaling) -> None:
    for row in curves.rows("weak"):
        if row["step_seconds"]:
            parts = {name: value for name, value in row["parts"].items() if name != "idle_gpus"}
            assert sum(parts.values()) == pytest.approx(row["step_seconds"])


def test_mixed_shapes_at_192_are_limited_by_the_exchange_of_gradients(curves: Scaling) -> None:
    # The paper: above 30 % of a step of less than 10,000 tokens (6.2.2); overlapped, some of it is left.
    assert "data-parallel communication" in next(r for r in curves.rows("weak") if r["gpus"] == 3000)["limit"]


def test_plan_scale_takes_the_fastest_layout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["model.num_layers=4", "model.num_attention_heads=4", "model.attention_head_dim=64"]
    data = ["data.buckets=[17x256x256]", "data.global_batch_size=32", "data.micro_batch_size=1"]
    picture = tmp_path / "scale.svg"
    command = ["scale", "--config", "demo", "--cluster", "h100", "--gpus", "8,16", *small, *data]
    assert main([*command, "--json", "--plot", str(picture)]) == 0
    every = json.loads(capsys.readouterr().out)["tables"]
    assert main([*command, "--json", "--layouts", "this"]) == 0
    this = json.loads(capsys.readouterr().out)["tables"]
    for title, rows in every.items():
        for best, configured in zip(rows, this[title], strict=True):
            assert best["step_seconds"] <= configured["step_seconds"] * (1 + 1e-9)
    assert picture.stat().st_size > 10_000


def test_reading_counts_where_storage_is_slower_than_the_step(config: PretrainConfig) -> None:
    def seconds(*changes: str) -> Seconds:
        found = judge(config, load_cluster("h800_step_video", changes), step_of(config, 256), config.parallel)
        assert isinstance(found, Plan)
        return found.seconds

    quick, slow = seconds(), seconds("storage.read_gbps=1")
    # Mean and log-variance of 64 channels, 179 tokens of Step-LLM and 77 of CLIP, in bf16.
    step = step_of(config, 256)
    text = 2 * (179 * 6144 + 77 * 1024)
    read = sum(batch.samples * count * (4 * 64 * batch.tokens + text) for batch, count in step.items())
    assert quick.hidden_data == pytest.approx(read / 200e9)
    assert slow.total == pytest.approx(read / 1e9)
    assert slow.data - quick.data == pytest.approx(slow.total - quick.total)


def test_the_pages_in_the_docs_are_of_this_planner() -> None:
    page = (OUT.parent / "scale.md").read_text(encoding="utf-8")
    assert published_section() in page
    for table in paper_curriculum().report("a").tables:
        assert table.markdown() in page
    pictures = re.findall(r"\]\((\w+\.png)\)", page)
    assert len(pictures) == 7
    assert all((OUT.parent / name).stat().st_size > 10_000 for name in pictures)


@pytest.mark.parametrize("gpus", [8, 24])
def test_the_quick_search_finds_what_the_whole_one_does(gpus: int) -> None:
    small = ["model.num_layers=4", "model.num_attention_heads=4", "model.attention_head_dim=64"]
    config = load_config(PretrainConfig, None, [*small, "data.buckets=[17x256x256]", "data.global_batch_size=48"])
    # So little memory that recomputation decides.
    cluster = load_cluster("h100", (f"gpus={gpus}", "memory_gib=6.08"))
    step = step_of(config, 64)
    quick, _ = fastest_by_size(config, cluster, step, 3)
    by_size: dict[int, float] = {}
    for plan in search(config, cluster, step).plans:
        by_size.setdefault(plan.parallel.model_parallel_size, plan.seconds.total)
    assert len({plan.parallel.recompute_num_layers for plan in quick}) > 1
    assert [plan.seconds.total for plan in quick] == pytest.approx(sorted(by_size.values())[:3])
