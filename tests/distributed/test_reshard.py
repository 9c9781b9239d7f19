"""`ckpt reshard` and `ckpt prune`: what is carried is equal bit for bit, and runs go on from it as from the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_elastic_runs import consumed, curve
from test_elastic_runs import run as train
from tiny_shards import write_tiny_shards

from checkpoints_tools import cli, transfer
from checkpoints_tools.core_contents import CoreContents
from checkpoints_tools.core_layout import CoreLayout
from checkpoints_tools.core_rewrite import Selection
from checkpoints_tools.models import read_model
from checkpoints_tools.prune import prune, prune_in_place
from checkpoints_tools.reshard import RECORD, Target, reshard
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from training.checkpoint import find_checkpoint, load_model_weights, read_config, read_state, step_folder
from training.checkpoint_files import read_state_values
from training.layout_matrix.checkpoints import OTHER_SEED, load_and_train, train_and_save
from training.layout_matrix.compare import QUANTITIES, assemble
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import LAYOUTS, STEPS, LayoutCase, Workload
from training.layout_matrix.worker import Report, build
from training.local_ranks import RankError, RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
WRITER = BY_NAME["tp2_sp_dp2_zero1"]
TARGETS = {"one": Target(), "pp2_vpp2_zero1": Target(tensor=2, pipeline=2, virtual=2, data=2, zero1=True)}
WEIGHTS_ONLY = Selection(optimizer=False, averages="drop")


@pytest.fixture(scope="module")
def source(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step's folder of a run in WRITER, with optimizer and averages."""
    folder = tmp_path_factory.mktemp("source")
    ranks.run(train_and_save, WRITER, Workload(), str(folder), ranks=WRITER.ranks)
    return step_folder(folder, STEPS)


def resume(ranks: RankPool, step: Path, case: LayoutCase = WRITER) -> list[Report]:
    reports: list[Report] = ranks.run(load_and_train, case, Workload(), str(step.parent.parent), ranks=case.ranks)
    return reports


def assert_same_tensors(first: CoreContents, second: CoreContents, *parts: Any) -> None:
    ours, theirs = first.of_part(*parts), second.of_part(*parts)
    assert ours.keys() == theirs.keys() != set()
    for fqn in ours:
        assert torch.equal(first.tensor(fqn), second.tensor(fqn)), fqn


@pytest.mark.parametrize("name", [pytest.param("one", marks=pytest.mark.heavy), "pp2_vpp2_zero1"])
def test_a_run_goes_on_from_it_as_from_the_source(name: str, source: Path, ranks: RankPool, tmp_path: Path) -> None:
    cut = step_folder(tmp_path, STEPS)
    reshard(source, cut, TARGETS[name])
    found, expected = resume(ranks, cut), resume(ranks, source)
    assert (found[0].losses, found[0].grad_norms) == (expected[0].losses, expected[0].grad_norms)
    for quantity in QUANTITIES:
        ours, theirs = assemble(found, quantity)[0], assemble(expected, quantity)[0]
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            np.testing.assert_array_equal(ours[tensor], value, err_msg=f"{quantity} of {tensor}")


@pytest.mark.heavy
def test_training_goes_on_with_the_same_samples_and_losses(ranks: RankPool, tmp_path: Path) -> None:
    shards, plain, cut = write_tiny_shards(tmp_path), tmp_path / "plain", tmp_path / "cut"
    train(ranks, shards, plain, 2, 2)
    shutil.copytree(plain, cut)
    shutil.rmtree(step_folder(cut, 2))
    reshard(step_folder(plain, 2), step_folder(cut, 2), Target(tensor=2, pipeline=2))
    for folder in (plain, cut):
        train(ranks, shards, folder, 2, 4)
    assert curve(cut) == curve(plain)
    assert sorted(consumed(cut)) == sorted(consumed(plain))
    assert {step for step, *_ in consumed(cut)} == {0, 1, 2, 3}
    # Without its optimizer's state the newest refuses to be gone on from.
    list(prune_in_place(step_folder(cut, 4), Selection(optimizer=False)))
    with pytest.raises(RankError, match="step_00000004 holds no optimizer state"):
        train(ranks, shards, cut, 2, 6)


def test_all_of_it_is_carried_and_lies_as_the_layout_cuts_it(source: Path, tmp_path: Path) -> None:
    target = TARGETS["pp2_vpp2_zero1"]
    report = reshard(source, tmp_path / "cut", target)
    before, after = CoreContents(source), CoreContents(tmp_path / "cut")
    assert before.entries.keys() == after.entries.keys()
    assert_same_tensors(before, after, "weights", "optimizer", "averages")
    assert all(before.object_bytes(fqn) == after.object_bytes(fqn) for fqn in before.of_part("objects"))
    assert (before.common, read_config(source)) == (after.common, read_config(tmp_path / "cut"))
    assert before.common == {"optimizer updates": STEPS}
    assert read_state_values(source)[0] == read_state_values(tmp_path / "cut")[0]
    model = read_model(source)
    layout = CoreLayout(model.config, target.parallel(), model.shapes, target.data)
    entry = after.entries["optimizer.state.exp_avg.layers.3.mlp.linear_fc2.weight"]
    expected = {(cut.offsets, cut.sizes, f"__{cut.rank}_0.distcp") for cut in layout.state(entry.name)}
    assert {(chunk.offsets, chunk.sizes, chunk.file) for chunk in entry.chunks} == expected
    assert report.files == len(list((tmp_path / "cut").glob("*.distcp"))) == 8
    assert json.loads((tmp_path / "cut" / RECORD).read_text())["layout"]["vpp"] == 2


def test_averages_take_the_place_of_weights(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "out", Target(), Selection(optimizer=False, averages="replace-weights"))
    before, after = CoreContents(source), CoreContents(tmp_path / "out")
    assert set(after.of_part("weights", "optimizer", "averages")) == set(before.of_part("weights"))
    for name in before.of_part("weights"):
        assert torch.equal(after.tensor(name), before.tensor(f"ema.{name}"))
    assert not read_state(tmp_path / "out").averages_weights


def test_a_cast_that_loses_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    bf16 = Selection(dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"patch_embedding.weight \(float32\) as bfloat16 changes \d+ of 384 values"):
        reshard(source, tmp_path / "out", Target(), bf16)
    assert not list(tmp_path.iterdir())
    reshard(source, tmp_path / "out", Target(), Selection(dtype=torch.bfloat16, allow_lossy=("*",)))
    before, after = CoreContents(source), CoreContents(tmp_path / "out")
    name = "layers.0.mlp.linear_fc1.weight"
    assert torch.equal(after.tensor(name), before.tensor(name).bfloat16())
    assert_same_tensors(before, after, "optimizer", "averages")


def test_what_was_left_half_written_is_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    reshard(source, whole, Target(tensor=2))
    monkeypatch.setattr(transfer, "_BYTES_BETWEEN_NOTES", 200_000)
    read, left = CoreContents.tensor, [100]

    def fail_later(contents: CoreContents, fqn: str) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise OSError(5, "Input/output error", "somewhere")
        return read(contents, fqn)

    monkeypatch.setattr(CoreContents, "tensor", fail_later)
    with pytest.raises(OSError, match="somewhere"):
        reshard(source, out, Target(tensor=2))
    monkeypatch.setattr(CoreContents, "tensor", read)
    assert not out.exists()
    reshard(source, out, Target(tensor=2))
    assert "continuing" in capsys.readouterr().err
    for path in whole.glob("*.distcp"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_dry_run_writes_nothing_and_counts_the_same(source: Path, tmp_path: Path) -> None:
    told = reshard(source, tmp_path / "out", TARGETS["pp2_vpp2_zero1"], dry_run=True)
    assert not list(tmp_path.iterdir())
    done = reshard(source, tmp_path / "out", TARGETS["pp2_vpp2_zero1"])
    assert (told.bytes, told.files, told.largest_file_bytes) == (done.bytes, done.files, done.largest_file_bytes)
    assert (told.written, told.verified, done.written, done.verified) == (False, False, True, True)


def refused(case: LayoutCase, folder: str) -> str:
    """On a rank: what a resume is told."""
    with pytest.raises(UserError) as error:
        load_and_train(case, Workload(), folder)
    return str(error.value)


def load_for_a_new_run(case: LayoutCase, folder: str) -> Report:
    """On a rank: only the weights, then one step."""
    session = build(case, Workload(), init_seed=OTHER_SEED)
    load_model_weights(Path(folder), session.model)
    session.optimizer.reload_model_params()
    return session.train(1)


def test_a_pruned_checkpoint_starts_a_run_but_resumes_none(source: Path, ranks: RankPool, tmp_path: Path) -> None:
    pruned = step_folder(tmp_path, STEPS)
    report = prune(source, pruned, WEIGHTS_ONLY)
    before, after = CoreContents(source), CoreContents(pruned)
    assert_same_tensors(before, after, "weights")
    assert not after.of_part("optimizer", "averages")
    dropped = before.of_part("optimizer", "averages").values()
    assert report.dropped_bytes == sum(entry.bytes for entry in dropped) == 4 * report.bytes
    (refusal,) = ranks.run(refused, ONE_PROCESS, str(tmp_path), ranks=1)
    assert "holds no optimizer state, so no run can continue from it" in refusal
    assert "ckpt prune" in refusal
    losses = [ranks.run(load_for_a_new_run, ONE_PROCESS, str(path), ranks=1)[0].losses for path in (source, pruned)]
    assert losses[0] == losses[1]
    assert run_command(cli.main, ["convert", "--in", str(pruned), "--out", str(tmp_path / "released")]) == 0


def run_of_three(source: Path, folder: Path) -> Path:
    for step in (1, 2, STEPS):
        shutil.copytree(source, step_folder(folder, step))
    (folder / "checkpoints" / "latest").write_text("step_00000003\n")
    return folder


def test_in_place_keeps_the_newest_and_the_place_of_the_others(source: Path, tmp_path: Path) -> None:
    run = run_of_three(source, tmp_path / "run")
    reports = list(prune_in_place(run, Selection(optimizer=False)))
    assert [Path(report.output).name for report in reports] == ["step_00000001", "step_00000002"]
    holds = [bool(CoreContents(find_checkpoint(step_folder(run, step))).of_part("optimizer")) for step in (1, 2, 3)]
    assert holds == [False, False, True]
    assert CoreContents(step_folder(run, 1)).of_part("averages")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000001", "step_00000002", "step_00000003"}
    assert (run / "checkpoints" / "latest").read_text() == "step_00000003\n"
    # Runs delete checkpoints by age, so it must not change.
    assert read_state_values(step_folder(run, 1))[0]["written"] == read_state_values(source)[0]["written"]
    assert not list(prune_in_place(run, Selection(optimizer=False)))


def test_a_kill_between_two_renames_loses_nothing(source: Path, tmp_path: Path) -> None:
    run = run_of_three(source, tmp_path / "run")
    step_folder(run, 1).rename(run / "checkpoints" / "step_00000001.replaced")
    assert len(list(prune_in_place(run, Selection(optimizer=False)))) == 2
    find_checkpoint(step_folder(run, 1))


def test_a_damaged_checkpoint_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    run = run_of_three(source, tmp_path / "run")
    place = CoreContents(source).entries["head.projection.weight"].chunks[0]
    file = step_folder(run, 1) / place.file
    content = bytearray(file.read_bytes())
    content[place.start + place.length // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000001 is damaged: __\d_\d.distcp has checksum"):
        list(prune_in_place(run, Selection(optimizer=False)))
    assert file.read_bytes() == content
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "latest",
        *(f"step_0000000{i}" for i in (1, 2, 3)),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reshard", "--tp", "3"], "the size does not divide the attention heads"),
        (["reshard", "--pp", "3"], "cannot be cut into 3 equal pieces"),
        (["reshard", "--tp", "0"], "at least 1"),
        (["reshard", "--vpp", "2"], "needs at least two"),
        (["reshard", "--dp", "0"], "at least 1"),
        (["reshard", "--ema", "replace-weights"], "needs --drop-optimizer"),
        (["reshard", "--allow-lossy", "*"], "without --dtype nothing is cast"),
        (["prune", "--keep-whole", "-1"], "at least 0"),
    ],
)
def test_bad_arguments_are_told(
    arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--in", str(source), "--out", str(tmp_path / "out")]
    assert run_command(cli.main, command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_folders_are_told(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    pruned = tmp_path / "pruned"
    prune(source, pruned, WEIGHTS_ONLY)
    replace = ["--drop-optimizer", "--ema", "replace-weights"]
    cases = [
        (["reshard", "--in", str(tmp_path / "none"), "--out", str(tmp_path / "out")], "is not a folder"),
        (["reshard", "--in", str(tmp_path / "empty"), "--out", str(tmp_path / "out")], "no complete checkpoint"),
        (["reshard", "--in", str(source), "--out", str(pruned)], "exists already"),
        (["reshard", "--in", str(pruned), "--out", str(tmp_path / "out"), *replace], "holds no averaged weights"),
        (["prune", "--in", str(pruned), "--out", str(tmp_path / "out")], "holds nothing of what is to be left out"),
    ]
    for command, message in cases:
        assert run_command(cli.main, command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
