"""Conversion between all forms: exact there and back, refused by name, whole or absent, continued after a kill."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_run

from checkpoints_tools import cli, transfer
from checkpoints_tools.convert import Options, convert
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.journal import Journal, begin_output
from checkpoints_tools.released import ReleasedFolder
from checkpoints_tools.verify import verify
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from training.local_ranks import _forking_context

WEIGHTS = "diffusion_pytorch_model.safetensors"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def released(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "transformer"
    convert(run, folder)
    return folder


def copy_with(released: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A released folder with some tensors replaced, or left out where None."""
    target.mkdir()
    (target / "config.json").write_bytes((released / "config.json").read_bytes())
    tensors = load_file(released / WEIGHTS) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, target / WEIGHTS)
    return target


def command(*arguments: str | Path) -> int:
    return run_command(cli.main, ["convert", *map(str, arguments)])


def test_there_and_back_is_bit_exact(run: Path, released: Path, tmp_path: Path) -> None:
    back = tmp_path / "core"
    report = convert(released, back)
    assert report.direction == "released -> core"
    first, second = CoreCheckpoint(run), CoreCheckpoint(back)
    assert first.templates.keys() == second.templates.keys() == first.model.released.keys()
    for name in first.templates:
        assert torch.equal(first.tensor(name), second.tensor(name)), name
    assert verify(back).faults == []
    # One number for the same weights in any form.
    assert report.digest == convert(run, tmp_path / "again", options=Options(to="core")).digest
    assert report.digest == convert(back, tmp_path / "one.safetensors").digest


def test_released_folder_has_the_released_names_and_config(run: Path, released: Path) -> None:
    tensors = load_file(released / WEIGHTS)
    core = CoreCheckpoint(run)
    assert set(tensors) == set(core.model.released.values())
    ours = core.tensor("layers.1.self_attention.linear_qkv.weight")
    assert torch.equal(tensors["transformer_blocks.1.attn1.wqkv.weight"], ours)
    stored = json.loads((released / "config.json").read_text())
    assert stored["_class_name"] == "StepVideoModel"
    assert ReleasedFolder(released).model == core.model


def test_several_files_and_one_file_say_the_same(run: Path, released: Path, tmp_path: Path) -> None:
    cut, single = tmp_path / "cut", tmp_path / "dit.safetensors"
    assert command("--in", run, "--out", cut, "--max-shard-gb", "0.0001") == 0
    files = sorted(cut.glob("*-of-*.safetensors"))
    assert len(files) > 2
    assert files[-1].name == f"diffusion_pytorch_model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((cut / f"{WEIGHTS}.index.json").read_text())
    assert {file: set(load_file(cut / file)) for file in set(index["weight_map"].values())} == {
        file.name: {name for name, place in index["weight_map"].items() if place == file.name} for file in files
    }
    assert command("--in", run, "--out", single) == 0
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected, one = load_file(released / WEIGHTS), load_file(single)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
        assert torch.equal(one[name], tensor), name
    assert merged.keys() == one.keys() == expected.keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pos_embed.proj.bias", None, "lacks tensors: pos_embed.proj.bias"),
        ("strange.weight", torch.ones(2), "has unknown tensors: strange.weight"),
        ("proj_out.bias", torch.ones(7), r"proj_out.bias has shape \[7\], its config says \[4\]"),
        ("proj_out.bias", torch.tensor([0, 1, float("nan"), 3]), r"proj_out.bias holds NaN or infinite values: 1 of 4"),
        ("proj_out.bias", torch.tensor([0, 1, float("-inf"), 3]), "proj_out.bias holds NaN"),
    ],
)
def test_faulty_tensors_are_refused_by_name(
    released: Path, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    faulty = copy_with(released, tmp_path / "faulty", **{name: value})
    with pytest.raises(UserError, match=message):
        convert(faulty, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["faulty"]


def test_bad_input_exits_with_2_and_writes_nothing(run: Path, released: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_00000007.writing").mkdir()
    (tmp_path / "model.safetensors").write_bytes((released / WEIGHTS).read_bytes()[:-1])
    out = tmp_path / "out"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("--in", tmp_path / "empty", "--out", out), "is in no form that is known"),
        (("--in", tmp_path / "none", "--out", out), "is not there"),
        (("--in", tmp_path / "step_00000007.writing", "--out", out), "complete"),
        (("--in", tmp_path / "model.safetensors", "--out", out), "cannot be read as safetensors"),
        (("--in", run, "--out", released), "exists already"),
        (("--in", run, "--out", out, "--ema"), "holds no averaged weights"),
        (("--in", released, "--out", out, "--ema"), "only megatron-core checkpoints keep averages"),
        (("--in", run, "--out", out, "--to", "file"), "--to file does not fit"),
        (("--in", run, "--out", tmp_path / "x.safetensors", "--to", "core"), "--to core does not fit"),
        (("--in", released, "--out", out, "--max-shard-gb", "1"), "cuts released folders"),
        (("--in", run, "--out", out, "--max-shard-gb", "0"), "must be above 0"),
        (("--in", run, "--out", out, "--allow-lossy", "*"), "without --dtype nothing is cast"),
        (("--in", run, "--out", out, "--dry-run", "--no-verify"), "give one of them"),
    ]
    before = sorted(tmp_path.iterdir())
    for arguments, message in cases:
        assert command(*arguments) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert sorted(tmp_path.iterdir()) == before


def test_a_cast_that_changes_values_is_refused_unless_it_is_named(run: Path, tmp_path: Path, capsys: Capture) -> None:
    half = tmp_path / "half"
    assert command("--in", run, "--out", half, "--dtype", "bf16") == 2
    refusal = capsys.readouterr().err
    assert "(float32) as bfloat16 changes" in refusal
    assert "--allow-lossy '" in refusal
    some = ("--in", run, "--out", half, "--dtype", "bf16", "--allow-lossy", "layers.*")
    assert command(*some) == 2
    assert "layers." not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert command("--in", run, "--out", half, "--dtype", "bf16", "--allow-lossy", "*") == 0
    core = CoreCheckpoint(run)
    for name, tensor in load_file(half / WEIGHTS).items():
        ours = next(our for our, theirs in core.model.released.items() if theirs == name)
        assert torch.equal(tensor, core.tensor(ours).bfloat16())
    # What is bf16 already loses nothing in fp32, and nothing on the way back.
    assert command("--in", half, "--out", tmp_path / "wide", "--dtype", "fp32") == 0
    assert command("--in", tmp_path / "wide", "--out", tmp_path / "narrow", "--dtype", "bf16") == 0
    narrow, first = load_file(tmp_path / "narrow" / WEIGHTS), load_file(half / WEIGHTS)
    assert all(torch.equal(narrow[name], tensor) for name, tensor in first.items())


def test_a_cast_never_makes_infinities(released: Path, tmp_path: Path) -> None:
    huge = copy_with(released, tmp_path / "huge", **{"proj_out.bias": torch.full((4,), 3.4e38)})
    with pytest.raises(UserError, match=r"proj_out.bias \(float32\) as bfloat16: .* becomes infinite"):
        convert(huge, tmp_path / "out", options=Options(dtype=torch.bfloat16, allow_lossy=("*",)))


def test_dry_run_tells_and_writes_nothing(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert command("--in", run, "--out", tmp_path / "out", "--dry-run", "--dtype", "bf16", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    templates = CoreCheckpoint(run).templates.values()
    assert report["tensors"] == report["cast"] == len(templates)
    assert report["bytes"] == 2 * sum(template.numel() for template in templates)
    assert report["digest"] is None
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_told_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("checkpoints_tools.journal.shutil.disk_usage", lambda _: usage)
    assert command("--in", run, "--out", tmp_path / "out", "--dry-run") == 2
    assert "GB needed, 0.000 GB free" in capsys.readouterr().err


def test_what_was_damaged_on_the_disk_is_not_kept(
    run: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[Path], None] = transfer.forget_pages

    def damage(path: Path) -> None:
        real(path)
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size * 3 // 4)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(transfer, "forget_pages", damage)
    for source, name in ((run, "released"), (released, "core"), (run, "one.safetensors")):
        with pytest.raises(UserError, match=r"does not hold what was written|cannot be read"):
            convert(source, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def in_child(prepare: Callable[[int], None], value: int, arguments: Sequence[str], log: Path) -> int:
    """Exit code of `ckpt convert ARGUMENTS` in another process after `prepare(value)`; negative: a signal's number."""
    process = _forking_context().Process(target=_child, args=(prepare, value, list(arguments), log))
    process.start()
    process.join()
    assert process.exitcode is not None
    return int(process.exitcode)


def _child(prepare: Callable[[int], None], value: int, arguments: list[str], log: Path) -> None:
    prepare(value)
    with open(log, "w") as sys.stderr:
        code = command(*arguments)
    os._exit(code)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def get_signal(number: int) -> None:
    """Let this process get a signal when its journal is written for the fifth time."""
    transfer._BYTES_BETWEEN_NOTES = 20_000
    note, noted = Journal.note, []

    def note_and_die(self: Journal, done: Mapping[str, str], position: object) -> None:
        note(self, done, position)
        noted.append(len(done))
        if len(noted) == 5:
            os.kill(os.getpid(), number)

    Journal.note = note_and_die  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("to", "number"), [("core", signal.SIGKILL), ("released", signal.SIGKILL), ("released", signal.SIGINT)]
)
def test_a_killed_conversion_goes_on_where_it_stood(
    run: Path, released: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, to: str, number: int
) -> None:
    out, plain, partial = tmp_path / "out", tmp_path / "plain", tmp_path / "out.partial"
    source = released if to == "core" else run
    arguments = ["--in", str(source), "--out", str(out)] + (["--max-shard-gb", "0.0001"] if to == "released" else [])
    assert in_child(get_signal, number, arguments, tmp_path / "log") == (130 if number == signal.SIGINT else -number)
    assert not out.exists()
    noted = json.loads((partial / ".journal.json").read_text())["done"]
    assert 0 < len(noted) < len(CoreCheckpoint(run).templates)

    read: list[str] = []
    kind: Any = ReleasedFolder if to == "core" else CoreCheckpoint
    tensor = kind.tensor

    def listed(self: Any, name: str) -> torch.Tensor:
        read.append(name)
        found: torch.Tensor = tensor(self, name)
        return found

    monkeypatch.setattr(kind, "tensor", listed)
    assert command(*arguments, "--no-verify") == 0
    assert f"continuing {partial}: {len(noted)} tensors are there already" in capsys.readouterr().err
    assert read
    assert not set(read) & set(noted)
    convert(source, plain, options=Options(shard_bytes=100_000 if to == "released" else None))
    same = {path.name for path in plain.iterdir()} - {"train_state.json"}
    assert {path.name for path in out.iterdir()} - {"train_state.json"} == same
    assert all((out / name).read_bytes() == (plain / name).read_bytes() for name in same)
    assert to == "released" or verify(out).faults == []
    assert not partial.exists()


@pytest.mark.parametrize("to", ["core", "released"])
def test_one_that_was_killed_at_its_very_end_is_finished_again(
    run: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    source, options = (released, Options()) if to == "core" else (run, Options(shard_bytes=100_000))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, step in (Journal, "publish"), (transfer, "forget_pages"):
        monkeypatch.setattr(owner, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", options=options)
        monkeypatch.undo()
        assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", options=options)
    convert(source, tmp_path / "plain", options=options)
    for path in (tmp_path / "plain").iterdir():
        if path.name != "train_state.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert to == "released" or verify(tmp_path / "out").faults == []


def test_another_source_or_other_arguments_start_anew(released: Path, tmp_path: Path, capsys: Capture) -> None:
    source = copy_with(released, tmp_path / "source")
    arguments = ["--in", str(source), "--out", str(tmp_path / "out")]
    in_child(get_signal, signal.SIGKILL, arguments, tmp_path / "log")
    in_child(get_signal, signal.SIGKILL, [*arguments, "--dtype", "fp32"], tmp_path / "log")
    stored = json.loads((tmp_path / "out.partial" / ".journal.json").read_text())
    assert stored["identity"]["dtype"] == "torch.float32"
    save_file(load_file(source / WEIGHTS) | {"proj_out.bias": torch.ones(4)}, source / WEIGHTS)
    assert command(*arguments) == 0
    assert "out.partial was begun with another dtype, source; starting anew" in capsys.readouterr().err
    assert torch.equal(CoreCheckpoint(tmp_path / "out").tensor("head.projection.bias"), torch.ones(4))


def test_two_commands_do_not_write_one_output(run: Path, tmp_path: Path, capsys: Capture) -> None:
    with begin_output(tmp_path / "out", {"command": "other"}):
        assert command("--in", run, "--out", tmp_path / "out") == 2
    assert "another run is writing there" in capsys.readouterr().err


def test_a_full_disk_leaves_the_source_and_no_output(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    arguments = ["--in", str(run), "--out", str(tmp_path / "out")]
    assert in_child(limit_files, 1 << 16, arguments, tmp_path / "log") == 2
    told = (tmp_path / "log").read_text()
    assert f"error: {tmp_path / 'out.partial' / WEIGHTS}: " in told
    assert "give the same command again" in told
    assert not (tmp_path / "out").exists()
    assert contents(run) == before
    assert command(*arguments) == 0


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
