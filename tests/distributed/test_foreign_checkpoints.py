"""Checkpoints that two ranks really wrote with DeepSpeed (every stage, universal) and FSDP2, read without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_models import assert_holds, read_all, released_weights, write_config
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.forms import Reading, find_form, open_weights
from checkpoints_tools.weights import check_tensors
from megatron_video.errors import UserError
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'megatron-video[vae]'")

from foreign_ranks import DIT_RUNS, GATHERED, UNIVERSAL, VAE_STAGES, write_all  # noqa: E402 - needs DeepSpeed


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all checkpoints, of ranks of their own: DeepSpeed keeps its first process group for life."""
    root = tmp_path_factory.mktemp("written")
    with RankPool(2, "cpu") as pool:
        pool.run(write_all, root, released_weights(), timeout_seconds=600)
    for name in (*DIT_RUNS, "fsdp"):
        write_config(root / name)
    return root


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(written / name, tmp_path / name))

    return copy


def _gathered(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / GATHERED)


@pytest.mark.parametrize("name", [*DIT_RUNS, "fsdp"])
def test_a_dit_is_bit_for_bit_what_the_ranks_held(written: Path, name: str) -> None:
    folder = written / name
    assert find_form(folder).name == ("torch-dcp" if name == "fsdp" else "deepspeed")
    expected = _gathered(folder)
    assert not torch.equal(expected["transformer_blocks.1.ff.net.2.weight"], released_weights()["proj_out.weight"])
    weights = open_weights(folder)
    assert_holds(weights, expected)
    check_tensors(weights)


def test_training_moved_the_weights_that_are_compared(written: Path) -> None:
    begin = released_weights()
    for name, (_, _, trained) in DIT_RUNS.items():
        for parameter, value in _gathered(written / name).items():
            moved = not torch.equal(value.float(), begin[parameter].to(value.dtype).float())
            assert moved == parameter.startswith(trained), (name, parameter)


@pytest.mark.parametrize("name", UNIVERSAL)
def test_a_universal_checkpoint_holds_the_same(written: Path, name: str, tmp_path: Path) -> None:
    folder = written / name / "global_step2_universal"
    assert_holds(open_weights(folder), _gathered(written / name))
    shutil.copytree(written / name, tmp_path / name, ignore=shutil.ignore_patterns("global_step?", "latest"))
    assert find_form(tmp_path / name).name == "deepspeed-universal"
    assert_holds(open_weights(tmp_path / name), _gathered(written / name))


@pytest.mark.parametrize("stage", VAE_STAGES)
def test_the_vae_of_train_vae_with_its_frozen_parts(written: Path, stage: int) -> None:
    weights = open_weights(written / f"vae{stage}" / "zero")
    assert weights.model.kind == "vae"
    assert_holds(weights, _gathered(written / f"vae{stage}"))


def test_the_modules_own_weights_are_an_option(written: Path) -> None:
    masters, module = (
        open_weights(written / "zero2", Reading(deepspeed_weights=values)) for values in ("fp32", "module")
    )
    for name, template in module.templates.items():
        assert template.dtype == torch.bfloat16
        assert torch.equal(module.tensor(name), masters.tensor(name).bfloat16())
    with pytest.raises(UserError, match=r"ZeRO 3 holds no module weights.*leave out --deepspeed-weights"):
        open_weights(written / "zero3", Reading(deepspeed_weights="module"))
    with pytest.raises(UserError, match="universal checkpoint, which is fp32"):
        open_weights(written / "zero2" / "global_step2_universal", Reading(deepspeed_weights="module"))


def test_a_folder_of_one_step_means_itself(written: Path) -> None:
    first = open_weights(written / "zero2" / "global_step1").tensor("head.projection.bias")
    latest = open_weights(written / "zero2").tensor("head.projection.bias")
    assert not torch.equal(first, latest)
    assert torch.equal(open_weights(written / "zero2" / "global_step2").tensor("head.projection.bias"), latest)


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("zero1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "written by 2 ranks and lacks {}"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "written by 2 ranks and lacks {}"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt", "written by 2 ranks and lacks {}"),
        ("zero2", "mp_rank_00_model_states.pt", "lacks the module's file, {}"),
    ],
)
def test_a_missing_ranks_file_is_named(copied: Callable[[str], Path], name: str, lost: str, message: str) -> None:
    folder = copied(name)
    (folder / "global_step2" / lost).unlink()
    with pytest.raises(UserError, match=message.format(lost)):
        open_weights(folder)


def test_lost_fp32_weights_are_not_replaced_in_silence(copied: Callable[[str], Path]) -> None:
    folder = copied("zero2")
    module = open_weights(folder, Reading(deepspeed_weights="module"))
    for file in (folder / "global_step2").glob("*_optim_states.pt"):
        file.unlink()
    with pytest.raises(UserError, match=r"lacks all ranks' .*; --deepspeed-weights module takes the module's"):
        open_weights(folder)
    found = open_weights(folder, Reading(deepspeed_weights="module"))
    assert all(torch.equal(found.tensor(name), module.tensor(name)) for name in module.templates)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("zero1", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_another_steps_file_among_them_is_named(copied: Callable[[str], Path], name: str, file: str) -> None:
    folder = copied(name)
    shutil.copy(folder / "global_step1" / file, folder / "global_step2" / file)
    with pytest.raises(UserError, match=rf"mixes steps: .* is of step 2, {file} of step 1"):
        open_weights(folder)


def test_more_ranks_files_than_wrote_it_are_named(copied: Callable[[str], Path]) -> None:
    step = copied("zero1") / "global_step2"
    shutil.copy(step / "zero_pp_rank_1_mp_rank_00_optim_states.pt", step / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match=r"zero_pp_rank_2_mp_rank_00_optim_states\.pt is left of another save"):
        open_weights(step)
    shutil.copy(step / "mp_rank_00_model_states.pt", step / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match="cut over 2 model-parallel ranks"):
        open_weights(step)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("zero1", "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero3", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero2", "global_step2_universal/zero/proj_out.bias/fp32.pt"),
        ("fsdp", "__1_0.distcp"),
    ],
)
def test_a_file_that_was_cut_off_is_named(copied: Callable[[str], Path], name: str, file: str) -> None:
    path = copied(name) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 8])
    folder = next(parent for parent in path.parents if parent.name.startswith(("global", "fsdp")))
    with pytest.raises(UserError, match=path.name):
        read_all(open_weights(folder))


def test_lost_pieces_of_other_forms_are_named(copied: Callable[[str], Path]) -> None:
    universal = copied("zero2") / "global_step2_universal"
    shutil.rmtree(universal / "zero" / "proj_out.bias")
    with pytest.raises(UserError, match=r"lacks zero/proj_out\.bias/fp32\.pt"):
        open_weights(universal)
    sharded = copied("fsdp")
    (sharded / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"lacks files that its \.metadata names: __1_0\.distcp"):
        open_weights(sharded)
    (universal.parent / "latest").write_text("global_step9")
    with pytest.raises(UserError, match="global_step9, which is not there"):
        open_weights(universal.parent, Reading(form="deepspeed"))
