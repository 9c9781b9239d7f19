"""The cost of curricula, beside the paper's Table 6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from training.curriculum_config import CURRICULUM_PRESET_DIR, CurriculumConfig, resolve_stages
from training.planner import table6
from training.planner.cluster import load_cluster
from training.planner.command import main
from training.planner.curriculum_cost import CurriculumCost, cost_curriculum

PRICES = ("price_per_gpu_hour=2", "watts_per_gpu=1000")


@pytest.fixture(scope="module")
def found() -> CurriculumCost:
    curriculum = load_config(CurriculumConfig, "step_video_30b", (), CURRICULUM_PRESET_DIR)
    return cost_curriculum(resolve_stages(curriculum), load_cluster("h800_step_video", PRICES), 256)


def test_every_stage_of_the_paper_works(found: CurriculumCost) -> None:
    assert not found.refused
    assert [cost.stage.name for cost in found.stages] == [*table6.ROWS, "sft"]


def test_samples_and_steps_are_those_of_table_6(found: CurriculumCost) -> None:
    rows = found.report("a").tables[1].rows
    assert len(rows) == 8
    for row in rows:
        assert row["steps"] == row["paper_steps"]
        assert abs(row["residual_percent"]) < 1


def test_flops_are_the_papers_samples_times_its_table_3(found: CurriculumCost) -> None:
    rows = {row["stage"]: row for row in found.rows()}
    for name, paper in table6.ROWS.items():
        if paper.table_3 is not None and name.startswith("t2i"):
            assert rows[name]["flops"] == pytest.approx(paper.seen * paper.table_3[0] * 1e12, rel=0.01)
        elif paper.table_3 is not None:
            low, high = (paper.seen * tflops * 1e12 for tflops in paper.table_3)
            assert low < rows[name]["flops"] < high


def test_the_first_540p_stage_is_within_two_points_of_the_measured_mfu(found: CurriculumCost) -> None:
    row = next(row for row in found.rows() if row["stage"] == "t2vi_540_s1")
    assert row["mfu_percent"] == pytest.approx(100 * table6.MEASURED_MFU, abs=2)


def test_totals_are_sums_and_hours_are_days_on_all_gpus(found: CurriculumCost) -> None:
    *rows, total = found.rows()
    for name in ("days", "gpu_hours", "cost", "samples", "flops", "megawatt_hours"):
        assert total[name] == pytest.approx(sum(row[name] for row in rows))
    for row in rows:
        assert row["gpu_hours"] == pytest.approx(row["days"] * 24 * row["gpus"])
        assert row["cost"] == pytest.approx(2 * row["gpu_hours"])
        assert row["megawatt_hours"] == pytest.approx(row["gpu_hours"] / 1000)
        assert row["days"] == pytest.approx(row["steps"] * row["step_seconds"] / row["effective"] / 86400)


def test_a_stage_has_as_many_gpus_as_its_batch_feeds_and_it_is_said(found: CurriculumCost) -> None:
    gpus = {cost.stage.name: cost.plan.gpus for cost in found.stages}
    # Table 6: one sample a node; 250 nodes.
    assert gpus["t2vi_540_s3"] == 2000
    assert any(note.startswith("t2vi_540_s3: on 2,000 GPUs") for note in found.notes)


def test_plan_curriculum_of_the_tiny_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "tiny.png"
    command = ["curriculum", "--config", "tiny", "--cluster", "h100", "--gpus-of", "sft=1", "--set", "gpus=2"]
    assert main([*command, "--json", "--plot", str(picture)]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert [row["stage"] for row in tables["Stages"]] == ["t2i", "t2vi_low", "t2vi_high", "sft", "total"]
    assert "Beside Table 6 of arXiv 2502.10248" not in tables
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--gpus-of", "sft"], "--gpus-of sft"),
        (["--gpus-of", "other=8"], "--gpus-of other=8: no such stage"),
        (["--config", "nothing"], "nothing"),
        (["common.training.stepz=1"], "stepz"),
        (["--text-tokens", "0"], "--text-tokens 0"),
    ],
)
def test_bad_input_is_refused_by_name(capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    assert run_command(main, ["curriculum", "--config", "tiny", "--cluster", "h100", *change]) == 2
    assert message in capsys.readouterr().err


def test_a_stage_that_does_not_work_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curriculum", "--config", "step_video_30b", "--cluster", "h100", "--set", "gpus=8"]) == 2
    assert "t2i_256_s1: does not work: out of memory" in capsys.readouterr().out
