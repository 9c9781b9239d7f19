"""Files of torch.save and torch's distributed checkpoints: every tensor as it is, one at a time, and nothing run."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_models import assert_holds, released_weights, tiny_dit, write_config
from torch import Tensor

from checkpoints_tools import cli
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.forms import FORMS, Reading, find_form, open_weights
from checkpoints_tools.torch_files import TorchFile
from megatron_video.cli import run_command
from megatron_video.errors import UserError

MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the sizes of the tiny DiT beside what is written there."""
    write_config(tmp_path)
    return tmp_path


class Malicious:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _saved(folder: Path, content: Any, name: str = "weights.pt", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def _prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in weights.items()}


# name -> (what a trainer makes of the weights, what is said to be left out of the names)
WRAPPED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "bare": (lambda w: w, ""),
    "our names": (lambda w: {ours: w[theirs] for ours, theirs in tiny_dit().released.items()}, ""),
    "DDP": (lambda w: _prefixed("module.", w), "without module. in"),
    "compiled": (lambda w: _prefixed("_orig_mod.", w), "without _orig_mod. in"),
    "nested": (
        lambda w: {"state_dict": _prefixed("model.", w), "step": 5, "args": Namespace(lr=1e-3)},
        "without state_dict.model. in",
    ),
    "FSDP": (
        lambda w: {
            n.replace("attn1", "_fsdp_wrapped_module.attn1._checkpoint_wrapped_module"): v for n, v in w.items()
        },
        "without _fsdp_wrapped_module., _checkpoint_wrapped_module. in",
    ),
    "with an optimizer": (
        lambda w: {
            "model": w,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "optim": {"exp_avg": w},
            "rng": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
            "best_loss": np.float64(0.5),
            "folder": Path("runs"),
        },
        "without model. in",
    ),
}


@pytest.mark.parametrize("trainer", WRAPPED)
def test_a_file_is_read_whatever_stands_before_the_names(
    folder: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped, said = WRAPPED[trainer]
    weights = released_weights(dtype=torch.bfloat16)
    path = _saved(folder, wrapped(weights))
    assert find_form(path).name == "torch"
    assert_holds(open_weights(path), weights)
    told = capsys.readouterr().err
    assert f"{path}: sizes from {folder / 'config.yaml'}" in told
    assert said in told
    assert ("without" in told) == bool(said)


def test_views_and_parameters_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.randn(40, 30)
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "strided": base[3:, ::2],
        "row": base[7],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "expanded": torch.randn(3, 1).expand(3, 4),
    }
    file = TorchFile(_saved(tmp_path, tensors))
    expected = torch.load(tmp_path / "weights.pt")
    assert file.templates.keys() == tensors.keys()
    for name, tensor in expected.items():
        found = file.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.shape == file.templates[name].shape == tensor.shape
        assert found.is_contiguous()
        assert torch.equal(found.float(), tensor.float()), name


def _mapped_bytes() -> int:
    """Of files, and in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_no_more_than_a_tensor_is_read_or_held(tmp_path: Path) -> None:
    path = _saved(tmp_path, {f"t{i}": torch.full((8 * MIB // 4,), float(i)) for i in range(12)})
    # What torch imports at the first file is not counted.
    TorchFile(_saved(tmp_path, {"t": torch.ones(1)}, "first.pt")).tensor("t")
    read, mapped = _bytes_read(), _mapped_bytes()
    file = TorchFile(path)
    assert _bytes_read() - read < MIB
    peak = 0
    for i in range(12):
        assert file.tensor(f"t{i}")[-1] == i
        peak = max(peak, _mapped_bytes() - mapped)
    assert 96 * MIB <= _bytes_read() - read < 98 * MIB
    # A mapped file would stay in memory, all 96 MiB of it.
    assert peak < 16 * MIB


def test_a_pickle_that_runs_something_does_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, mark, allowed = released_weights(), folder / "mark", torch.serialization.get_safe_globals()
    path = _saved(folder, {"model": weights, "callback": Malicious(mark)})
    with pytest.raises(UserError, match=r"weights\.pt asks to run posix\.mkdir.*--trust-pickle"):
        open_weights(path)
    assert not mark.exists()
    assert_holds(open_weights(path, Reading(trust_pickle=True)), weights)
    assert mark.is_dir()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    assert f"warning: --trust-pickle: running what the pickle in {path} asks for" in capsys.readouterr().err


def test_so_does_a_released_folder_with_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _saved(tmp_path, {"weights": torch.ones(3), "callback": Malicious(tmp_path / "mark")}, "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin asks to run posix\.mkdir.*--trust-pickle"):
        open_weights(tmp_path)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(UserError):  # the weights are no model's
        open_weights(tmp_path, Reading(trust_pickle=True))
    assert (tmp_path / "mark").is_dir()


def test_several_sets_of_weights_are_told_apart_by_key(folder: Path) -> None:
    first, second = released_weights(1), released_weights(2)
    path = _saved(folder, {"model": first, "ema": second, "mine": {"shadow": first}})
    with pytest.raises(UserError, match=r"more than once; give one of --key ema .*--key mine.shadow .*--key model "):
        open_weights(path)
    assert_holds(open_weights(path, Reading(key="ema")), second)
    assert_holds(open_weights(path, Reading(key="mine.shadow")), first)
    with pytest.raises(UserError, match="no tensors of this model under --key other; give one of --key ema"):
        open_weights(path, Reading(key="other"))
    beside = _saved(folder, {**first, "ema": second}, "beside.pt")
    with pytest.raises(UserError, match=r"--key \. \("):
        open_weights(beside)
    assert_holds(open_weights(beside, Reading(key=".")), first)
    unusual = _saved(folder, {"theirs": first}, "unusual.pt")
    with pytest.raises(UserError, match="not clear; give one of --key theirs"):
        open_weights(unusual)


def test_other_tensors_among_them_are_refused_by_name_or_ignored(folder: Path) -> None:
    weights = released_weights()
    path = _saved(folder, {"model": {**weights, "rope.freqs": torch.ones(3)}})
    with pytest.raises(UserError, match=r"unknown tensors: model\.rope\.freqs; --ignore PATTERN"):
        open_weights(path)
    assert_holds(open_weights(path, Reading(ignored=("rope.*",))), weights)
    twice = {**weights, "head.projection.bias": weights["proj_out.bias"]}
    with pytest.raises(UserError, match=r"holds head\.projection\.bias as"):
        open_weights(_saved(folder, twice, "twice.pt"))
    wrapped = {**weights, "_orig_mod.proj_out.bias": weights["proj_out.bias"]}
    with pytest.raises(UserError, match="holds tensors twice"):
        open_weights(_saved(folder, wrapped, "wrapped.pt"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_pickle(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_w2"))


def _repack(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is no whole file of torch.save"),
        (lambda path: path.write_bytes(b""), "is no whole file of torch.save"),
        (_flip_pickle, "_rebuild_tensor_w2"),
        (_repack, "packed by another program|damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is no whole file of torch.save"),
    ],
)
def test_damaged_files_are_refused_by_name(folder: Path, damage: Any, message: str) -> None:
    path = _saved(folder, released_weights())
    damage(path)
    with pytest.raises(UserError, match=rf"(?s)weights\.pt.*({message})"):
        open_weights(path)


def test_files_without_weights_or_in_the_old_format_say_what_to_do(folder: Path) -> None:
    with pytest.raises(UserError, match="holds no tensors by name"):
        open_weights(_saved(folder, {"epoch": 3}))
    with pytest.raises(UserError, match=r"no name is one of this video DiT's; the first are conv\.weight"):
        open_weights(_saved(folder, {"conv.weight": torch.ones(3)}))
    old = _saved(folder, released_weights(), _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6; load and save that with torch\.save once more"):
        open_weights(old)


def test_sizes_come_from_a_named_file_too(tmp_path: Path) -> None:
    weights, away = released_weights(), tmp_path / "away"
    path = _saved(tmp_path, weights)
    with pytest.raises(UserError, match=r"there is no .*config\.json.*: give --config FILE"):
        open_weights(path)
    assert_holds(open_weights(path, Reading(config=write_config(away))), weights)
    with pytest.raises(UserError, match=r"--config .*none\.yaml is not there"):
        open_weights(path, Reading(config=away / "none.yaml"))
    (away / "other.yaml").write_text("lr: 1\n")
    with pytest.raises(UserError, match="must have one of the sections model, vae"):
        open_weights(path, Reading(config=away / "other.yaml"))


def test_a_distributed_checkpoint_is_read_by_either_names(folder: Path) -> None:
    weights = released_weights(dtype=torch.bfloat16)
    state = {"model": weights, "optim": {"state": _prefixed("exp_avg.", weights), "lr": 0.1}, "step": 7}
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    assert find_form(folder / "dcp").name == "torch-dcp"
    assert_holds(open_weights(folder / "dcp"), weights)
    next((folder / "dcp").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"lacks files that its \.metadata names: __0_0\.distcp"):
        open_weights(folder / "dcp")


def test_the_metadata_of_a_distributed_checkpoint_runs_nothing(folder: Path) -> None:
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(Malicious(folder / "mark")))
    with pytest.raises(UserError, match=r"\.metadata is a pickle that asks for posix\.mkdir"):
        open_weights(folder / "dcp")
    assert not (folder / "mark").exists()


def test_what_is_in_no_form_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(
            UserError,
            match=r"no form that is known.*latest.*\.metadata.*safetensors.*train_state\.json.*\*\.pt.*--form",
        ):
            open_weights(path)
    with pytest.raises(UserError, match=r"none\.pt is not there"):
        open_weights(tmp_path / "none.pt")
    plain = _saved(tmp_path, released_weights(), "checkpoint-of-mine")
    write_config(tmp_path)
    with pytest.raises(UserError, match="no form that is known"):
        open_weights(plain)
    assert_holds(open_weights(plain, Reading(form="torch")), released_weights())


@pytest.mark.parametrize("form", [form.name for form in FORMS])
@pytest.mark.parametrize("content", ["folder", "file", "pointers"])
def test_a_path_that_is_not_of_the_form_it_is_said_to_be_is_refused(folder: Path, form: str, content: str) -> None:
    path = folder / content
    if content == "file":
        path.write_bytes(b"no weights")
    else:
        path.mkdir()
    if content == "pointers":
        (path / "latest").write_bytes(b"\xff\x00")
        (path / "latest_universal").write_text("global_step9")
    with pytest.raises(UserError, match=content):
        open_weights(path, Reading(form=form))


def test_convert_takes_them_and_the_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = released_weights(), folder / "core"
    path = _saved(folder, {"a": {"model": weights, "rope": torch.ones(3)}, "b": Malicious(folder / "mark")})
    command = ["convert", "--in", str(path), "--out", str(out)]
    assert run_command(cli.main, command) == 2
    assert "--trust-pickle" in capsys.readouterr().err
    assert run_command(cli.main, [*command, "--trust-pickle"]) == 2
    assert "--key a.model" in capsys.readouterr().err
    (folder / "mark").rmdir()
    options = ["--key", "a.model", "--ignore", "rope", "--config", str(folder / "config.yaml"), "--form", "torch"]
    assert run_command(cli.main, [*command, "--trust-pickle", *options]) == 0
    assert_holds(CoreCheckpoint(out), weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"module": 3},
        {"param_shapes": [3]},
        {"param_shapes": [{"proj_out.bias": "wide"}]},
        {"shared_params": {"a": "b"}},
        {"frozen_param_shapes": {"a": torch.Size([2])}},
        {"param_shapes": [{"proj_out.bias": torch.Size([9])}]},
    ],
    ids=str,
)
def test_a_deepspeed_checkpoint_that_holds_other_things_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    optimizer = {"zero_stage": 1, "partition_count": 1, "single_partition_of_fp32_groups": [torch.ones(4)]}
    _saved(folder, {"optimizer_state_dict": optimizer}, "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    model = {"module": {}, "param_shapes": [{"proj_out.bias": torch.Size([4])}], **changes}
    _saved(folder, model, "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"is not laid out as DeepSpeed|lists parameters of 9 values, .* hold 4"):
        open_weights(folder)
