"""`ckpt diff`: what differs is named and measured, over forms, layouts, averages and optimizer state."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_checkpoint import RELEASED_FILE, make_tensors, write_cut_checkpoint, write_released_form
from safetensors.torch import load_file, save_file
from tiny_models import MODEL
from torch import Tensor

from checkpoints_tools import cli
from megatron_video.cli import run_command
from training.checkpoint_files import read_state_values, write_state

NAME = "layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return make_tensors()


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cut_checkpoint(tmp_path_factory.mktemp("cut") / "step_00000007", tensors)


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        code = run_command(cli.main, ["diff", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err if code == 2 else printed.out

    return run


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """The weights as a checkpoint in one piece; its name is that of no step."""
    weights = {name: value for name, value in tensors.items() if not name.startswith(("ema.", "optimizer."))}
    return write_cut_checkpoint(folder, weights, ranks=1)


def report(ckpt: Callable[..., tuple[int, str]], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, text = ckpt(*arguments, "--json")
    return code, json.loads(text)


def test_equal_weights_in_other_cuts_and_forms_are_equal(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    whole = write(tmp_path / "whole", tensors)
    released = write_released_form(tmp_path / "released", tensors)
    for other in (whole, released):
        code, found = report(ckpt, folder, other)
        assert (code, found["equal"], found["tensors"], found["different"]) == (0, True, 49, [])
    assert "bit by bit" in ckpt(folder, released)[1]


def test_every_difference_is_measured_and_named(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    changed = tensors[NAME].clone()
    changed[3, 4] += 0.5
    other = write(tmp_path / "other", {**tensors, NAME: changed})
    code, found = report(ckpt, folder, other)
    assert (code, found["equal"], found["different"]) == (1, False, [NAME])
    (detail,) = found["details"]
    gap = (tensors[NAME].double() - changed.double()).norm().item()
    assert detail["differing"] == 1
    assert detail["max_abs"] == pytest.approx(0.5)
    assert detail["relative"] == pytest.approx(gap / tensors[NAME].double().norm().item())
    assert [g["group"] for g in found["groups"] if g["differing"]] == ["layers.mlp"]
    assert f"{NAME} float32" in ckpt(folder, other)[1]


def test_tolerance_decides_the_exit_code(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    bf16 = write(tmp_path / "bf16", {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert ckpt(folder, bf16)[0] == 1
    code, text = ckpt(folder, bf16, "--tolerance", "4e-3")
    assert code == 0
    assert "all are within 0.004" in text
    assert ckpt(folder, bf16, "--tolerance", "1e-4")[0] == 1


def test_shapes_and_lonely_tensors_are_differences(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    released = write_released_form(tmp_path / "released", tensors)
    stored = load_file(released / RELEASED_FILE)
    stored["proj_out.bias"] = torch.ones(7)
    del stored["pos_embed.proj.bias"]
    save_file(stored, released / RELEASED_FILE)
    # A tolerance forgives no missing tensor.
    code, found = report(ckpt, folder, released, "--tolerance", "9")
    assert code == 1
    verdicts = {detail["name"]: detail["verdict"] for detail in found["details"]}
    assert verdicts == {"head.projection.bias": "shape", "patch_embedding.bias": "only first"}
    assert "float32 4 | float32 7" in ckpt(folder, released)[1]


def test_filter_looks_at_some_tensors_only(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    other = write(tmp_path / "other", {**tensors, NAME: tensors[NAME] + 1})
    assert ckpt(folder, other, "--filter", "layers.0.*")[0] == 0
    assert ckpt(folder, other, "--filter", "layers.0.*", "--filter", "*.linear_fc2.*")[0] == 1
    code, text = ckpt(folder, other, "--filter", "nothing*")
    assert (code, "no tensor is named nothing*" in text) == (2, True)


def test_averages_are_compared_where_there_are_any(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    averages = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    other = write(tmp_path / "averages", averages)
    assert ckpt(folder, other)[0] == 1
    code, text = ckpt(folder, other, "--ema")
    assert (code, "moving averages" in text) == (0, True)
    code, text = ckpt(other, other, "--ema")
    assert (code, "holds averages; leave --ema out" in text) == (2, True)


def test_resumed_runs_are_compared_down_to_moments_and_counts(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    twin = tmp_path / "twin"
    write_cut_checkpoint(twin, tensors)
    assert ckpt(folder, twin, "--optimizer")[0] == 0
    values, files = read_state_values(twin)
    write_state(twin, values | {"consumed_samples": {"17x48x48": 57}}, files)
    code, found = report(ckpt, folder, twin, "--optimizer")
    assert code == 1
    assert found["state"] == [{"name": "consumed_samples.17x48x48", "first": 56, "second": 57}]
    assert ckpt(folder, twin)[0] == 0
    code, text = ckpt(folder, write(tmp_path / "weights", tensors), "--optimizer")
    assert (code, "weights holds no optimizer state" in text) == (2, True)


def test_a_moment_that_differs_is_named(folder: Path, tmp_path: Path, ckpt: Callable[..., tuple[int, str]]) -> None:
    other = write_cut_checkpoint(tmp_path / "other", make_tensors(seed=1))
    code, found = report(ckpt, folder, other, "--optimizer", "--filter", "optimizer.state.exp_avg.head*")
    assert code == 1
    assert found["different"] == [
        f"optimizer.state.exp_avg.head.{name}" for name in ("modulation_table", "projection.bias", "projection.weight")
    ]
    assert [group["group"] for group in found["groups"]] == ["optimizer exp_avg"]


def test_other_sizes_are_told_and_do_not_decide(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, ckpt: Callable[..., tuple[int, str]]
) -> None:
    other = write_cut_checkpoint(tmp_path / "other", tensors, model=replace(MODEL, norm_eps=1e-5))
    code, found = report(ckpt, folder, other)
    assert code == 0
    assert {"name": "model.norm_eps", "first": 1e-06, "second": 1e-05} in found["config"]


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf"])
def test_a_tolerance_that_means_nothing_is_refused(
    folder: Path, tensors: dict[str, Tensor], tolerance: str, ckpt: Callable[..., tuple[int, str]]
) -> None:
    code, text = ckpt(folder, folder, f"--tolerance={tolerance}")
    assert (code, "must be a number of at least 0" in text) == (2, True)
