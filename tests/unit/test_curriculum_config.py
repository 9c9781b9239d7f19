"""Curricula: put together from presets, common fields and a stage's own, and refused by name where they cannot be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.layout import Hardware
from training.curriculum import check_stages
from training.curriculum_config import CURRICULUM_PRESET_DIR, CurriculumConfig, Stage, resolve_stages


def resolve(preset: str, *overrides: str) -> list[Stage]:
    return resolve_stages(load_config(CurriculumConfig, preset, overrides, CURRICULUM_PRESET_DIR))


def test_all_stages_of_the_30b_are_one_chain() -> None:
    stages = resolve("step_video_30b", "common.data.shards=[x]")
    assert [stage.config.training.steps for stage in stages[:-1]] == [
        steps * 1000 for steps in (53, 200, 171, 101, 158, 23, 17, 6)
    ]
    for before, stage in itertools.pairwise(stages):
        assert stage.config.run.initial_weights == before.config.run.output_dir
    # 375 nodes of 8 up to the first stage at 540P, as Table 6 implies.
    check_stages(stages[:6], 3000, Hardware())
    check_stages(stages[6:8], 2000, Hardware())
    with pytest.raises(UserError, match=r"stage 't2vi_540_s[23]'"):
        check_stages(stages, 3000, Hardware())


def test_a_stages_own_fields_stand_above_common_ones_and_those_above_the_preset() -> None:
    stages = resolve("tiny", "common.training.steps=50", "stages.sft.settings.training.steps=40")
    assert [stage.config.training.steps for stage in stages] == [50, 50, 50, 40]
    assert stages[0].config.optimizer.learning_rate == 3e-3
    assert [stage.config.run.stage for stage in stages] == ["t2i", "t2vi_low", "t2vi_high", "sft"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.sft.settings.run.output_dir=x"], r"stages.sft.settings.run.output_dir='x': the curriculum sets it"),
        (["common.run.initial_weights=x"], r"common.run.initial_weights='x'"),
        (["stages.t2i.take=ema"], "no stage before the first"),
        (["stages.t2vi_low.take=ema"], "'t2i' keeps none: set stages.t2i.settings.ema.decay"),
        (["stages.sft.settings.model.num_layers=2"], r"stage 'sft' cannot .* model.num_layers=2, there 4"),
        (["common.run.stage=same"], "run.stage must differ"),
        (["stages.sft.settings.training.stepz=2"], "stage 'sft' of the curriculum: unknown field 'training.stepz'"),
        (["stages.t2i.preset=nothing"], "'nothing' is neither a file nor a preset"),
        (["stages.a/b.preset=tiny_t2i"], "name is that of its folder"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("tiny", *overrides)


def test_the_first_stage_may_start_from_other_weights() -> None:
    stages = resolve("tiny", "stages.t2i.settings.run.initial_weights=runs/other")
    assert stages[0].config.run.initial_weights == "runs/other"


def test_stages_that_cannot_share_a_job_are_refused() -> None:
    stages = resolve("tiny", "common.data.shards=[x]", "stages.sft.settings.parallel.use_megatron_fsdp=true")
    cuda = Hardware(True, (9, 0), None, (12, 8))
    with pytest.raises(UserError, match="use_megatron_fsdp is set in sft only"):
        check_stages(stages, 2, cuda)
    check_stages(stages[:3], 2, cuda)
    with pytest.raises(UserError, match=r"stage 't2i': data\.shards is empty"):
        check_stages(resolve("tiny"), 2, cuda)


def test_a_curriculum_without_stages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: x\nstages: {}\n")
    with pytest.raises(UserError, match="stages is empty"):
        resolve(str(tmp_path / "c.yaml"))
