"""What a megatron-core checkpoint holds, read by stored names, from any cut, and without opening a foreign pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from cut_checkpoint import make_tensors, write_cut_checkpoint
from torch import Tensor

from checkpoints_tools.core_contents import CoreContents
from megatron_video.errors import UserError

QKV = "layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return make_tensors()


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cut_checkpoint(tmp_path_factory.mktemp("cut") / "step_00000007", tensors)


def test_every_tensor_comes_back_from_its_cuts(folder: Path, tensors: dict[str, Tensor]) -> None:
    contents = CoreContents(folder)
    assert contents.entries.keys() == tensors.keys()
    assert [chunk.offsets for chunk in contents.entries[QKV].chunks] == [(0, 0), (96, 0)]
    for name, expected in tensors.items():
        assert torch.equal(contents.tensor(name), expected), name
    assert contents.common == {"optimizer updates": 7}


def test_entries_know_their_part_role_and_parameter(folder: Path, tensors: dict[str, Tensor]) -> None:
    entries = CoreContents(folder).entries
    described = {name: (entries[name].part, entries[name].role, entries[name].name) for name in tensors}
    assert described[QKV] == ("weights", "weight", QKV)
    assert described[f"ema.{QKV}"] == ("averages", "ema", QKV)
    assert described[f"optimizer.state.exp_avg_sq.{QKV}"] == ("optimizer", "exp_avg_sq", QKV)
    assert entries[QKV].bytes == 4 * 192 * 64


def test_a_box_across_the_cut_is_that_part_of_the_tensor(folder: Path, tensors: dict[str, Tensor]) -> None:
    assert torch.equal(CoreContents(folder).box(QKV, (90, 3), (20, 50)), tensors[QKV][90:110, 3:53])


class _Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_metadata_that_would_run_a_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Harm(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"\.metadata is a pickle that asks for posix\.system"):
        CoreContents(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_unreadable_metadata_and_files_are_named(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata cannot be read \(No such file"):
        CoreContents(tmp_path)
    (tmp_path / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:500])
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        CoreContents(tmp_path)
    (tmp_path / ".metadata").write_bytes((folder / ".metadata").read_bytes())
    contents = CoreContents(tmp_path)
    with pytest.raises(UserError, match=rf"distcp: {QKV} cannot be read: .*No such file"):
        contents.tensor(QKV)
