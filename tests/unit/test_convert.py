"""Conversion between megatron-core checkpoints and the released names: exact there and back, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_run

from checkpoints_tools import cli
from checkpoints_tools.convert import convert, digests
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.forms import open_weights
from checkpoints_tools.released import GIGABYTE, ReleasedFolder
from megatron_video.cli import run_command
from megatron_video.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def released(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "transformer"
    convert(run, folder, shard_bytes=GIGABYTE, verify=True)
    return folder


def copy_with(released: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A released folder with some tensors replaced, or left out where None."""
    target.mkdir()
    (target / "config.json").write_bytes((released / "config.json").read_bytes())
    tensors = load_file(released / "diffusion_pytorch_model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, target / "diffusion_pytorch_model.safetensors")
    return target


def test_there_and_back_is_bit_exact(run: Path, released: Path, tmp_path: Path) -> None:
    back = tmp_path / "core"
    report = convert(released, back, shard_bytes=GIGABYTE, verify=True)
    assert report.direction == "released -> core"
    first, second = CoreCheckpoint(run), CoreCheckpoint(back)
    assert first.templates.keys() == second.templates.keys() == first.model.released.keys()
    for name in first.templates:
        assert torch.equal(first.tensor(name), second.tensor(name)), name
    assert run_command(cli.main, ["diff", str(run), str(back)]) == 0


def test_released_folder_has_the_released_names_and_config(run: Path, released: Path) -> None:
    tensors = load_file(released / "diffusion_pytorch_model.safetensors")
    core = CoreCheckpoint(run)
    assert set(tensors) == set(core.model.released.values())
    ours = core.tensor("layers.1.self_attention.linear_qkv.weight")
    assert torch.equal(tensors["transformer_blocks.1.attn1.wqkv.weight"], ours)
    stored = json.loads((released / "config.json").read_text())
    assert stored["_class_name"] == "StepVideoModel"
    assert ReleasedFolder(released).model == core.model


def test_several_files_with_an_index_say_the_same(run: Path, released: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    convert(run, cut, shard_bytes=100_000, verify=True)
    assert len(list(cut.glob("*-of-*.safetensors"))) > 2
    assert digests(open_weights(cut)) == digests(open_weights(released))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pos_embed.proj.bias", None, "lacks tensors: pos_embed.proj.bias"),
        ("strange.weight", torch.ones(2), "has unknown tensors: strange.weight"),
        ("proj_out.bias", torch.ones(7), r"proj_out.bias has shape \[7\], its config says \[4\]"),
        ("proj_out.bias", torch.full((4,), float("nan")), "proj_out.bias holds NaN"),
    ],
)
def test_faulty_tensors_are_refused_by_name(
    released: Path, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    faulty = copy_with(released, tmp_path / "faulty", **{name: value})
    with pytest.raises(UserError, match=message):
        convert(faulty, tmp_path / "out", shard_bytes=GIGABYTE, verify=True)
    assert not (tmp_path / "out").exists()


def test_bad_folders_exit_with_2_and_write_nothing(
    run: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    half = tmp_path / "step_00000007.writing"
    half.mkdir()
    for source, message in ((empty, "no form"), (tmp_path / "none", "is not there"), (half, "complete")):
        assert run_command(cli.main, ["convert", "--in", str(source), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert run_command(cli.main, ["convert", "--in", str(run), "--out", str(released)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not out.exists()


def test_diff_names_the_tensor_that_differs(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_with(released, tmp_path / "other", **{"proj_out.bias": torch.full((4,), 9.0)})
    assert run_command(cli.main, ["diff", str(released), str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["different"] == ["head.projection.bias"]
