"""`ckpt inspect`: what is told of runs, checkpoints and released folders is what was put there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_checkpoint import RELEASED_FILE, make_tensors, write_cut_checkpoint, write_released_form
from torch import Tensor

from checkpoints_tools import cli
from checkpoints_tools.core_contents import Chunk, CoreContents, Entry
from checkpoints_tools.stored_layout import pieces, stored_layout
from megatron_video.cli import run_command

Inspect = Callable[..., str]
QKV = "layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return make_tensors(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cut_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000007", tensors)


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    def run(*arguments: object, code: int = 0) -> str:
        assert run_command(cli.main, ["inspect", *map(str, arguments)]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def report(inspect: Inspect, *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inspect(*arguments, "--json"))
    return found


def test_a_checkpoint_is_told_in_full(folder: Path, tensors: dict[str, Tensor], inspect: Inspect) -> None:
    found = report(inspect, folder)
    count = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith(("ema.", "optimizer.")))
    assert (found["kind"], found["faults"], found["state"]["step"]) == ("video DiT", [], 7)
    weights, averages = found["parts"]["weights"], found["parts"]["averages"]
    assert (weights["tensors"], weights["parameters"], weights["bytes"]) == (49, count, 2 * count)
    assert (averages["bytes"], averages["dtypes"]) == (4 * count, {"float32": 49})
    assert found["parts"]["optimizer"]["parameters"] == 3 * count
    assert sum(group["parameters"] for group in found["groups"].values()) == count
    assert found["model"]["num_layers"] == 2
    assert found["changed"]["training.precision"] == "fp32"
    assert "model.num_layers" not in found["changed"]
    assert found["parallel"]["tensor_model_parallel_size"] == 2
    assert (found["layout"]["tensor_parallel"], found["layout"]["pipeline_stages"]) == (2, 1)
    assert found["state"]["consumed_samples"] == {"17x48x48": 56}
    assert found["encoders"] == {"vae": "af01", "text": "be02"}
    assert found["common"] == {"optimizer updates": 7}
    assert {file["name"]: file["size"] for file in found["files"]} == {
        p.name: p.stat().st_size for p in folder.iterdir()
    }
    assert all(file["crc32"] for file in found["files"] if file["name"] != "train_state.json")
    assert {row["name"] for row in found["tensors"]} == tensors.keys()


def test_text_fits_a_terminal(folder: Path, inspect: Inspect) -> None:
    for options in ((), ("--tensors",), ("--stats",)):
        text = inspect(folder, *options)
        assert max(map(len, text.splitlines())) <= 120
    assert "video DiT, step 7" in text
    assert "a guess from that: TP 2" in text
    assert "layers.self_attention" in text


def test_figures_are_those_of_the_tensors(folder: Path, tensors: dict[str, Tensor], inspect: Inspect) -> None:
    found = report(inspect, folder, "--stats", "--filter", "*layers.1.self*qkv*", "--sort", "norm")
    norms = {row["name"]: row["stats"]["norm"] for row in found["tensors"]}
    assert norms == {
        prefix + QKV: pytest.approx(tensors[prefix + QKV].double().norm().item())
        for prefix in ("", "ema.", *(f"optimizer.state.{role}." for role in ("param", "exp_avg", "exp_avg_sq")))
    }
    assert list(norms.values()) == sorted(norms.values(), reverse=True)


def test_nan_is_seen_by_stats(tensors: dict[str, Tensor], tmp_path: Path, inspect: Inspect) -> None:
    broken = tensors[QKV].clone()
    broken[0, :3] = float("nan")
    broken[1, 0] = float("inf")
    weights = {name: value for name, value in tensors.items() if not name.startswith(("ema.", "optimizer."))}
    folder = write_cut_checkpoint(tmp_path / "step_00000007", {**weights, QKV: broken})
    first = report(inspect, folder, "--sort", "nan")["tensors"][0]
    assert (first["name"], first["stats"]["nan"], first["stats"]["inf"]) == (QKV, 3, 1)


def test_metadata_alone_is_read(folder: Path, tmp_path: Path, inspect: Inspect) -> None:
    copy = tmp_path / "step_00000007"
    shutil.copytree(folder, copy)
    for file in copy.glob("*.distcp"):
        file.write_bytes(b"\0" * file.stat().st_size)
    found, original = report(inspect, copy), report(inspect, folder)
    same = ("faults", "parts", "groups", "layout", "tensors", "files")
    assert {name: found[name] for name in same} == {name: original[name] for name in same}


def test_a_run_lists_its_checkpoints(folder: Path, tmp_path: Path, inspect: Inspect) -> None:
    run = tmp_path / "run"
    for step in (3, 7, 9):
        shutil.copytree(folder, run / "checkpoints" / f"step_{step:08d}")
    (run / "checkpoints" / "step_00000009" / "common.pt").unlink()
    (run / "checkpoints" / "step_00000011.writing").mkdir()
    found = report(inspect, run)
    rows = [(row["step"], row["newest"], row["fault"]) for row in found["checkpoints"]]
    assert rows == [(3, False, None), (7, True, None), (9, False, "common.pt is missing")]
    assert found["unfinished"] == ["step_00000011.writing"]
    recorded = sum(file.stat().st_size for file in folder.iterdir() if file.name != "train_state.json")
    assert found["checkpoints"][1]["bytes"] == recorded
    text = inspect(run)
    assert "DAMAGED: common.pt is missing" in text
    assert "step_00000011.writing" in text
    assert "step 7, " in inspect(run, "--tensors")


def test_damage_is_told_and_does_not_keep_from_looking(folder: Path, tmp_path: Path, inspect: Inspect) -> None:
    copy = tmp_path / "step_00000007"
    shutil.copytree(folder, copy)
    (copy / "config.yaml").write_text("model: [")
    found = report(inspect, copy)
    assert [fault.split(":")[0] for fault in found["faults"][1:]] == ["config.yaml cannot be read"]
    assert "config.yaml has 8 bytes" in found["faults"][0]
    assert found["parts"]["weights"]["tensors"] == 49
    assert "FAULT: config.yaml" in inspect(copy)


def test_released_weights_are_told_by_our_names(tensors: dict[str, Tensor], tmp_path: Path, inspect: Inspect) -> None:
    released = write_released_form(tmp_path / "released", tensors)
    for path in (released, released / RELEASED_FILE):
        found = report(inspect, path, "--tensors")
        row = next(row for row in found["tensors"] if row["name"] == QKV)
        assert (row["stored"], row["shape"]) == ("transformer_blocks.1.attn1.wqkv.weight", [192, 64])
        assert found["model"]["num_layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{missing}",), "is not there"),
        (("{empty}",), "is in no form that is known"),
        (("{folder}", "--filter", "nothing*"), "no tensor is named nothing*"),
        (("{half}",), ".metadata cannot be read"),
    ],
)
def test_bad_input_is_refused(
    folder: Path, tmp_path: Path, inspect: Inspect, arguments: tuple[str, ...], message: str
) -> None:
    places = {name: tmp_path / name for name in ("missing", "empty")} | {"folder": folder}
    places["half"] = tmp_path / "step_00000001"
    for name in ("empty", "half"):
        places[name].mkdir()
    assert message in inspect(*(argument.format(**places) for argument in arguments), code=2)


def test_layouts_are_guessed_from_cuts_and_files(folder: Path) -> None:
    contents = CoreContents(folder)

    def entry(name: str, places: list[tuple[tuple[int, int], int]], part: Any = "weights") -> Entry:
        chunks = tuple(Chunk(offset, (2, 2), f"__{rank}_0.distcp", 0, 1) for offset, rank in places)
        prefix = "ema." if part == "averages" else ""
        return Entry(prefix + name, part, "weight", name, (4, 4), torch.float32, chunks)

    cut = [((0, 0), 0), ((2, 0), 1)]
    entries = [
        entry("layers.0.a", cut),
        entry("layers.1.a", [((0, 0), 1), ((2, 0), 3)]),  # other replicas wrote some of it
        entry("layers.3.a", [((0, 0), 0)]),
        entry("layers.2.a", [(offset, rank + 4) for offset, rank in cut]),
        entry("layers.0.a", [((0, 0), 0), ((2, 0), 1), ((2, 2), 2)], "averages"),
    ]
    contents.entries = {each.fqn: each for each in entries}
    found = stored_layout(contents)
    assert (found.tensor_parallel, found.pipeline_stages, found.optimizer_cut_further) == (2, 2, True)
    assert (found.writing_ranks, found.tensor_files, found.pieces) == (6, 6, {"2x1": 3})
    assert pieces(entries[-1]) == "3 pieces"
