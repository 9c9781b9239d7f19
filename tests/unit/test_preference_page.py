"""The page about Video-DPO of the 30B: its figures against what they are made of."""

from __future__ import annotations

import pytest

from megatron_video.config_io import load_config
from training.config import PretrainConfig
from training.dpo import PRESET_DIR
from training.dry_run import write_preference_page as page
from training.planner.step_time import forward_seconds, step_seconds


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return load_config(PretrainConfig, "step_video_30b_dpo", [], PRESET_DIR)


def test_a_forward_pass_is_a_quarter_of_a_step_that_recomputes_all(config: PretrainConfig) -> None:
    job = page._job(config, 256)
    forward, step = forward_seconds(job), step_seconds(job)
    # Forward, its recomputation, and a backward pass of twice the products, of attention's 2.5 times.
    assert 4 * forward.gemm == pytest.approx(step.gemm)
    assert 4.5 * forward.attention == pytest.approx(step.attention)


def test_memory_is_that_of_fine_tuning_on_as_many_rows(config: PretrainConfig) -> None:
    rows = page._memory_table(config).rows
    for ours, tuned in zip(rows[::2], rows[1::2], strict=True):
        assert (ours["training"], tuned["training"]) == ("DPO", "fine-tuning")
        assert ours["total"] <= 1.05 * tuned["total"]


def test_a_second_model_takes_room_and_time(config: PretrainConfig) -> None:
    one, two = page._second_model_table(config).rows[:2]
    # 58.7 GB of bf16 weights over 8 ranks, and the norms that every rank has.
    assert two["second model"] == pytest.approx(7.04, abs=0.05)
    assert one["recomputed"] < two["recomputed"]
    assert two["step_s"] > 1.2 * one["step_s"]
