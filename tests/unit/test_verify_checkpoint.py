"""`ckpt verify`: every fault that is made here is named, and nothing else is."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_checkpoint import RELEASED_FILE, make_tensors, sign, write_cut_checkpoint, write_released_form
from safetensors.torch import load_file, save_file
from tiny_models import MODEL
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from checkpoints_tools import cli
from checkpoints_tools.core_contents import read_metadata
from megatron_video.cli import run_command
from training.checkpoint_files import STATE_FILE

QKV = "layers.1.self_attention.linear_qkv.weight"
RELEASED_QKV = "transformer_blocks.1.attn1.wqkv.weight"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
Verify = Callable[..., list[str]]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return make_tensors()


@pytest.fixture(scope="module")
def whole(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cut_checkpoint(tmp_path_factory.mktemp("whole") / "step_00000007", tensors)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "step_00000007"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Faults, after the exit code has been compared with them."""

    def run(*arguments: object) -> list[str]:
        code = run_command(cli.main, ["verify", *map(str, arguments), "--json"])
        (verdict,) = json.loads(capsys.readouterr().out)
        assert code == (1 if verdict["faults"] else 0)
        faults: list[str] = verdict["faults"]
        return faults

    return run


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Rewrite .metadata, with checksums that are right for what is then there."""
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)


def drop(name: str) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        del metadata.state_dict_metadata[name]
        metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != name}

    return change


def chunks_of(name: str, *boxes: tuple[int, int]) -> Callable[[Any], None]:
    """(first row, rows) of every piece, all where the first piece lies."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[name]
        (index, place) = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == name)
        columns = entry.size[1]
        entry.chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((rows, columns))) for row, rows in boxes]
        for number, (row, _) in enumerate(boxes):
            metadata.storage_data[type(index)(name, (row, 0), number)] = place

    return change


def test_a_whole_checkpoint_has_no_fault(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.main, ["verify", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert f"{whole}: whole" in printed
    assert "245 tensors" in printed
    assert run_command(cli.main, ["verify", str(whole), "--quick"]) == 0
    assert "sizes and metadata only" in capsys.readouterr().out


def test_all_checkpoints_of_a_run_are_looked_at(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (7, 8):
        shutil.copytree(whole, tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "run" / "checkpoints" / "step_00000007" / "common.pt").unlink()
    assert run_command(cli.main, ["verify", str(tmp_path / "run"), "--quick"]) == 0  # the newest alone
    assert "step_00000007" not in capsys.readouterr().out
    assert run_command(cli.main, ["verify", str(tmp_path / "run"), "--quick", "--all"]) == 1
    printed = capsys.readouterr().out
    assert "step_00000007: FAULTY\n  common.pt is missing" in printed
    assert "step_00000008: whole" in printed


def test_a_flipped_bit_is_found_by_its_checksum(folder: Path, verify: Verify) -> None:
    path = folder / "__0_1.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert "__0_1.distcp has checksum" in verify(folder)[0]
    # Its size is right, and nothing is read.
    assert verify(folder, "--quick") == []


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_a_file_that_is_cut_off_is_named(folder: Path, verify: Verify, quick: tuple[str, ...]) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1000])
    faults = verify(folder, *quick)
    assert faults[0].startswith("__0_0.distcp has ")
    assert any("pieces lie beyond" in fault for fault in faults)


def test_a_missing_and_an_extra_file_are_named(folder: Path, verify: Verify) -> None:
    (folder / "__0_0.distcp").rename(folder / "__9_9.distcp")
    faults = verify(folder, "--quick")
    assert faults[0] == "__0_0.distcp is missing"
    assert any(fault.startswith("__0_0.distcp is missing, and ") for fault in faults)
    assert faults[-1] == "__9_9.distcp is not part of the checkpoint: train_state.json does not list it"


@pytest.mark.parametrize("prefix", ["", "ema.", "optimizer.state.exp_avg_sq."])
def test_a_tensor_missing_in_the_metadata_is_named(folder: Path, verify: Verify, prefix: str) -> None:
    change_metadata(folder, drop(prefix + QKV))
    assert verify(folder) == [f"{prefix}{QKV} is missing"]


def test_unknown_and_misshapen_tensors_are_named(folder: Path, verify: Verify) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["strange"] = metadata.state_dict_metadata.pop("head.projection.bias")
        metadata.storage_data = {
            (type(i)("strange", i.offset) if i.fqn == "head.projection.bias" else i): place
            for i, place in metadata.storage_data.items()
        }
        metadata.state_dict_metadata[QKV].size = torch.Size((192, 32))

    change_metadata(folder, change)
    faults = verify(folder, "--quick")
    assert f"{QKV} has shape 192x32, its config says 192x64" in faults
    assert "head.projection.bias is missing" in faults
    assert "strange is unknown: the model has no such tensor" in faults


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        (((0, 96),), "its pieces hold 6144 of 12288 values"),
        (((0, 96), (90, 96)), "pieces at [0, 0] and [90, 0] overlap"),
        (((0, 96), (100, 96)), "its piece at [100, 0] of 96x64 lies outside of it"),
    ],
)
def test_pieces_must_cover_a_tensor_once(
    folder: Path, verify: Verify, boxes: tuple[tuple[int, int], ...], fault: str
) -> None:
    change_metadata(folder, chunks_of(QKV, *boxes))
    assert f"{QKV}: {fault}" in verify(folder, "--quick")


def test_pieces_that_share_bytes_are_named(folder: Path, verify: Verify) -> None:
    change_metadata(folder, chunks_of(QKV, (0, 96), (96, 96)))
    assert any(f"{QKV} and {QKV} share bytes" in fault for fault in verify(folder, "--quick"))


@pytest.mark.parametrize("name", [QKV, f"ema.{QKV}", f"optimizer.state.exp_avg.{QKV}"])
def test_values_that_are_not_finite_are_counted(
    tensors: dict[str, Tensor], tmp_path: Path, verify: Verify, name: str
) -> None:
    broken = tensors[name].clone()
    broken[5, 5], broken[150, 1] = float("nan"), float("-inf")
    folder = write_cut_checkpoint(tmp_path / "step_00000007", {**tensors, name: broken})
    assert verify(folder) == [f"{name} holds 1 NaN and 1 infinite values among 12288"]
    assert verify(folder, "--quick") == []


def test_state_that_contradicts_the_tensors_is_named(folder: Path, verify: Verify) -> None:
    sign(folder, averages=False)
    assert "averages_weights=false" in verify(folder, "--quick")[0]
    torch.save({}, folder / "common.pt")
    sign(folder)
    assert verify(folder, "--quick") == [
        "'optimizer updates', the count that goes with the optimizer state, is None in common.pt"
    ]


def test_damaged_metadata_config_and_state_are_named(folder: Path, verify: Verify) -> None:
    (folder / "config.yaml").write_text("model: {num_layers: many}")
    (folder / ".metadata").write_bytes(b"\x80\x04nonsense")
    sign(folder)
    faults = verify(folder, "--quick")
    assert "num_layers='many'" in faults[0]
    assert ".metadata is damaged" in faults[1]
    (folder / STATE_FILE).write_text("{}")
    assert any("train_state.json is damaged" in fault for fault in verify(folder, "--quick"))


@pytest.mark.parametrize("suffix", [".writing", ".partial", ".deleting"])
def test_a_half_written_folder_is_no_checkpoint(folder: Path, verify: Verify, suffix: str) -> None:
    half = folder.rename(folder.with_name(folder.name + suffix))
    assert verify(half) == [
        f"its writing was interrupted, or its deletion ({suffix}): it is no checkpoint yet, or no more"
    ]


def test_an_old_checkpoint_without_checksums_is_whole_and_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((folder / STATE_FILE).read_text())
    for name in ("checksums", "digest", "written"):
        del values[name]
    (folder / STATE_FILE).write_text(json.dumps(values))
    assert run_command(cli.main, ["verify", str(folder)]) == 0
    assert f"of {len(values['files'])} files only the size was recorded" in capsys.readouterr().out


def test_the_config_of_another_model_is_told_field_by_field(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, verify: Verify
) -> None:
    config = tmp_path / "other.yaml"
    config.write_text(json.dumps({"model": {**vars(MODEL), "num_layers": 3, "norm_eps": 1e-5}}, default=list))
    assert verify(folder, "--quick", "--config", config) == [
        f"model.num_layers is 2; {config} says 3",
        f"model.norm_eps is 1e-06; {config} says 1e-05",
    ]
    other = write_cut_checkpoint(tmp_path / "other", tensors, model=replace(MODEL, norm_eps=1e-5))
    assert verify(folder, "--like", other, "--quick") == [f"model.norm_eps is 1e-06; {other} says 1e-05"]
    assert verify(folder, "--like", write_released_form(tmp_path / "released", tensors), "--quick") == []


@pytest.fixture
def released(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """A released folder of two files with an index."""
    folder = write_released_form(tmp_path / "released", tensors)
    stored = load_file(folder / RELEASED_FILE)
    (folder / RELEASED_FILE).unlink()
    names = sorted(stored)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: stored[name] for name in members}, folder / file)
    total = sum(tensor.nbytes for tensor in stored.values())
    placed = {name: file for file, members in files.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}))
    return folder


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_whole_released_folder_has_no_fault(released: Path, verify: Verify) -> None:
    assert verify(released) == []


def test_faults_of_an_index_are_named(released: Path, verify: Verify) -> None:
    right = json.loads((released / INDEX).read_text())["weight_map"]
    file = right[RELEASED_QKV]
    wrong = "b.safetensors" if file == "a.safetensors" else "a.safetensors"
    change_index(released, lambda index: index["weight_map"].update({RELEASED_QKV: wrong}))
    faults = verify(released)
    assert f"{INDEX}: it says that {RELEASED_QKV} is in {wrong}, it is in {file}" in faults
    change_index(released, lambda index: index["weight_map"].update({RELEASED_QKV: file, "ghost": "c.safetensors"}))
    assert verify(released)[0] == f"{INDEX}: it names c.safetensors, which is not there"
    change_index(released, lambda index: index["weight_map"].pop("ghost") and index["metadata"].update(total_size=12))
    assert verify(released)[0].startswith(f"{INDEX}: it says total_size=12, the tensors have ")


def test_files_beside_the_index_and_tensors_in_two_files_are_named(released: Path, verify: Verify) -> None:
    save_file({RELEASED_QKV: torch.ones(2)}, released / "c.safetensors")
    faults = verify(released)
    assert f"{INDEX}: c.safetensors lies beside it, and it does not name it" in faults
    assert any(fault.startswith(f"{RELEASED_QKV} is stored 2 times") for fault in faults)


def test_a_released_file_that_is_cut_off_or_has_a_wrong_header_is_named(
    tensors: dict[str, Tensor], tmp_path: Path, verify: Verify
) -> None:
    folder = write_released_form(tmp_path / "released", tensors)
    path = folder / RELEASED_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert any("it is cut off" in fault for fault in verify(folder))
    path.write_bytes(content + b"\0" * 8)
    assert any("it has more at its end" in fault for fault in verify(path))
    path.write_bytes(content.replace(b'"shape":[4]', b'"shape":[5]'))
    assert any("has 16 bytes, its shape and type need 20" in fault for fault in verify(folder))
    path.write_bytes(b"\xff" * 100)
    assert "its header is said to have" in verify(folder)[0]


def test_released_tensors_that_lack_or_are_not_finite_are_named(
    tensors: dict[str, Tensor], tmp_path: Path, verify: Verify
) -> None:
    folder = write_released_form(tmp_path / "released", tensors)
    stored = load_file(folder / RELEASED_FILE)
    stored[RELEASED_QKV][0, 0] = float("nan")
    del stored["pos_embed.proj.bias"]
    stored["strange"] = torch.ones(1)
    save_file(stored, folder / RELEASED_FILE)
    assert set(verify(folder)) == {
        "pos_embed.proj.bias is missing",
        "strange is unknown to the model",
        f"{RELEASED_QKV} holds 1 NaN and 0 infinite values among 12288",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tmp}/none",), "is not there"),
        (("{tmp}",), "is in no form that is known"),
        (("{folder}", "--config", "nothing"), "neither a file nor a preset"),
        (("{folder}", "--config", "demo", "--like", "{folder}"), "give one of them"),
        (("{folder}", "--threads", "0"), "must be at least 1"),
    ],
)
def test_bad_input_exits_with_2(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run_command(cli.main, ["verify", *(a.format(tmp=tmp_path, folder=whole) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
