"""Saves behind the training: a copy of the moment, whole or not at all, one at a time, errors that are told."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_folders import DATA_FILE, flip, write_folder

from megatron_video.dit import DiTConfig, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig, one_process
from training import checkpoint_disk, checkpoint_writer
from training.checkpoint import TrainState, agree_on_newest, find_checkpoint, load_checkpoint, step_folder
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_files import find_fault, find_flip, read_state_values
from training.checkpoint_folders import prune, publish, recover
from training.checkpoint_saver import CheckpointError, CheckpointSaver, SaveReport
from training.config import AdamWConfig, PretrainConfig
from training.ema import EMA
from training.optimizer import build_optimizer, wrap_data_parallel

MODEL = DiTConfig(
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=6,
    out_channels=6,
    caption_channels=[24, 12],
)


@dataclass
class Run:
    """A model with its optimizer and averages, and the saves of it."""

    folder: Path
    parallel: ParallelConfig
    model: list[Any]
    optimizer: Any
    ema: EMA
    reports: list[SaveReport] = field(default_factory=list)

    def saver(self, **settings: Any) -> CheckpointSaver:
        return CheckpointSaver(self.folder, CheckpointConfig(**settings), 0, self.reports.append)

    def save(self, saver: CheckpointSaver, step: int) -> Path:
        return saver.save(self.model, self.optimizer, TrainState(step=step), PretrainConfig(model=MODEL), self.ema)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model[0].parameters():
                parameter.fill_(value)
        self.ema.restart()

    def values(self, checkpoint: Path) -> set[float]:
        """Every number of the weights and averages of a checkpoint."""
        other = build(checkpoint, self.parallel)
        load_checkpoint(checkpoint, other.model, other.optimizer, other.ema)
        tensors = [*other.model[0].parameters(), *(item for item in other.ema.averages if item is not None)]
        return {float(value) for tensor in tensors for value in tensor.detach().unique()}


def build(folder: Path, parallel: ParallelConfig) -> Run:
    chunks = build_dit(MODEL, parallel, torch.float32, device=torch.device("cpu"), init_seed=0)
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, AdamWConfig(), parallel)
    return Run(folder, parallel, model, optimizer, EMA(optimizer, 0.9))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with one_process() as parallel:
        yield build(tmp_path / "run", parallel)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written once this is set."""
    allowed, write = threading.Event(), checkpoint_writer.Share.write

    def held_back(share: checkpoint_writer.Share) -> checkpoint_writer.WrittenShare:
        assert allowed.wait(30)
        return write(share)

    monkeypatch.setattr(checkpoint_writer.Share, "write", held_back)
    return allowed


def test_what_is_saved_is_the_moment_of_the_save(run: Run, writing: threading.Event) -> None:
    saver = run.saver()
    run.fill(1.0)
    folder = run.save(saver, 1)
    run.fill(2.0)
    assert saver.busy
    assert not folder.exists()
    writing.set()
    saver.finish()
    assert not saver.busy
    assert run.values(folder) == {1.0}
    (report,) = run.reports
    assert report.bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != "train_state.json")
    assert 0 < report.blocked_seconds < report.seconds
    assert str(folder) in str(report)


def test_a_second_save_waits_for_the_first_and_says_so(run: Run, writing: threading.Event) -> None:
    saver = run.saver()
    run.fill(1.0)
    first = run.save(saver, 1)
    run.fill(2.0)
    threading.Timer(0.3, writing.set).start()
    second = run.save(saver, 2)
    # The second uses the buffers of the first, so that had to be complete.
    assert find_fault(first) is None
    saver.finish()
    assert (run.values(first), run.values(second)) == ({1.0}, {2.0})
    assert run.reports[1].waited_seconds > 0.2
    assert "for the save before it" in str(run.reports[1])


def test_later_saves_which_plan_no_more_hold_their_own_moment(run: Run) -> None:
    saver = run.saver()
    folders = []
    for step in range(1, 6):
        run.fill(float(step))
        folders.append(run.save(saver, step))
        run.fill(-1.0)
    saver.finish()
    assert [run.values(folder) for folder in folders] == [{float(step)} for step in range(1, 6)]


def test_checksums_are_those_of_the_files(run: Run) -> None:
    folder = run.save(run.saver(asynchronous=False), 1)
    names = {path.name for path in folder.iterdir()} - {"train_state.json"}
    _, files = read_state_values(folder)
    assert {*files} == names
    assert {"__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "metadata.json", "config.yaml"} == names
    for name, stored in files.items():
        content = (folder / name).read_bytes()
        assert (stored.size, stored.crc32) == (len(content), zlib.crc32(content))


def test_a_save_starts_no_process(tmp_path: Path) -> None:
    """What a rank starts would outlive it when it is killed; in a fresh process, as others may have started some."""
    program = (
        "import sys, psutil; from pathlib import Path; from test_checkpoint_saver import build, one_process\n"
        "with one_process() as parallel:\n"
        "    run = build(Path(sys.argv[1]), parallel)\n"
        "    saver = run.saver()\n"
        "    run.save(saver, 1)\n"
        "    found = psutil.Process().children(recursive=True)\n"
        "    saver.finish()\n"
        "    assert not [*found, *psutil.Process().children(recursive=True)], found\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": paths}, timeout=120
    )


def test_host_memory_is_taken_once(run: Run) -> None:
    saver = run.saver()
    addresses = []
    for step in (1, 2, 3, 4):
        run.save(saver, step)
        saver.wait()
        buffers = saver._strategy._copies._buffers
        addresses.append([buffer.data_ptr() for buffer in buffers.values()])
    assert addresses == addresses[:1] * 4
    # Weights, both moments and averages; fp32 weights are the optimizer's own, stored under both names, copied once.
    assert sum(buffer.numel() for buffer in buffers.values()) == 4 * sum(p.numel() for p in run.model[0].parameters())


@contextmanager
def largest_file(count: int) -> Iterator[None]:
    """No file of this process grows beyond `count` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_and_wait(run: Run, saver: CheckpointSaver, step: int) -> None:
    run.save(saver, step)
    saver.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_names_the_file_and_leaves_the_older_checkpoint(run: Run, asynchronous: bool) -> None:
    saver = run.saver(asynchronous=asynchronous)
    run.fill(1.0)
    older = run.save(saver, 1)
    saver.wait()
    message = r"cannot write .*__0_\d.distcp: File too large; .* GB free there, .* GB needed by this rank"
    with largest_file(20_000), pytest.raises(CheckpointError, match=message):
        save_and_wait(run, saver, 2)
    assert [path.name for path in sorted(older.parent.iterdir())] == ["latest", older.name]
    assert (run.values(older), find_checkpoint(run.folder)) == ({1.0}, older)
    assert [report.error is None for report in run.reports] == [True, False]
    # The disk has room again.
    assert find_fault(run.save(saver, 3)) is None or asynchronous
    saver.finish()


def test_training_can_go_on_after_a_failed_save_but_not_end_with_one(run: Run) -> None:
    saver = run.saver(on_error="continue")
    with largest_file(20_000):
        run.save(saver, 1)
        saver.drain()
    run.save(saver, 2)
    saver.wait()
    assert find_checkpoint(run.folder) == step_folder(run.folder, 2)
    with largest_file(20_000):
        run.save(saver, 3)
        with pytest.raises(CheckpointError, match="step_00000003"):
            saver.finish()


def test_a_failed_save_is_told_at_once_and_raised_by_the_next_one(run: Run) -> None:
    saver = run.saver()
    with largest_file(20_000):
        run.save(saver, 1)
        saver.drain()
    assert [report.step for report in run.reports if report.error] == [1]
    with pytest.raises(CheckpointError, match="step_00000001 FAILED"):
        run.save(saver, 2)


def test_a_save_that_takes_too_long_is_an_error(run: Run, writing: threading.Event) -> None:
    saver = run.saver(max_wait_seconds=0.2)
    run.save(saver, 1)
    with pytest.raises(CheckpointError, match=r"not complete after 0.2 s .checkpoint.max_wait_seconds"):
        saver.finish()
    writing.set()


def test_a_folder_that_cannot_be_made_is_named(run: Run) -> None:
    run.folder.mkdir()
    (run.folder / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoints"):
        run.save(run.saver(), 1)


def test_a_full_disk_is_noticed_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        run.folder = disk / "run"
        with pytest.raises(CheckpointError, match=r"no room in .*checkpoints: 0\.\d+ GB needed, 0\.00\d GB free"):
            run.save(run.saver(), 1)
        assert not list((run.folder / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_meanwhile_leaves_no_half_checkpoint(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        run.folder = disk / "run"
        saver = run.saver(on_error="continue")
        older = run.save(saver, 1)
        saver.wait()
        size = run.reports[0].bytes
        with _someone_else_fills(disk, until_free=size // 2):
            run.save(saver, 2)
            saver.wait()
        assert f"{os.strerror(errno.ENOSPC)}" in run.reports[1].error
        assert [path.name for path in sorted(older.parent.iterdir())] == ["latest", older.name]
        run.save(saver, 3)
        saver.finish()
        assert find_checkpoint(run.folder) == step_folder(run.folder, 3)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def _someone_else_fills(disk: Path, until_free: int) -> Iterator[None]:
    """Between the check of the room and the first byte."""
    write, other = checkpoint_writer.Share.write, disk / "other"

    def fill_then_write(share: checkpoint_writer.Share) -> checkpoint_writer.WrittenShare:
        other.write_bytes(b"\0" * (shutil.disk_usage(disk).free - until_free))
        return write(share)

    checkpoint_writer.Share.write = fill_then_write
    try:
        yield
    finally:
        checkpoint_writer.Share.write = write
        other.unlink()


def test_files_that_rank_0_cannot_see_are_no_checkpoint(
    run: Run, writing: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_disk.wait_until_visible, "__defaults__", (0.3,))
    write = checkpoint_writer.Share.write

    def on_a_disk_of_its_own(share: checkpoint_writer.Share) -> checkpoint_writer.WrittenShare:
        written = write(share)
        (step_folder(run.folder, 1).with_suffix(".writing") / DATA_FILE).unlink()
        return written

    monkeypatch.setattr(checkpoint_writer.Share, "write", on_a_disk_of_its_own)
    writing.set()
    saver = run.saver()
    run.save(saver, 1)
    with pytest.raises(CheckpointError, match=rf"{DATA_FILE} is missing.*file system that all nodes share"):
        saver.finish()
    assert not list((run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["__0_1.distcp", ".metadata", "common.pt"])
def test_a_flipped_bit_is_refused_by_name_or_an_older_one_taken_when_asked(
    run: Run, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    saver = run.saver(asynchronous=False)
    older, newest = run.save(saver, 1), run.save(saver, 2)
    flip(newest / name)
    root = newest.parent
    with pytest.raises(UserError, match=rf"step_00000002 is damaged: {name} has checksum .* its bytes changed since"):
        agree_on_newest(root, CheckpointConfig(verify="checksums"))
    assert agree_on_newest(root, CheckpointConfig(verify="checksums", on_damage="older")) == older
    assert f"ignoring {newest}: {name}" in caplog.text
    assert agree_on_newest(root, CheckpointConfig()) == newest


def dies_at(call: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed before its `call`-th change to the file system; whether it came so far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = itertools.count(call, -1)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: real(*args, **kwargs) if next(left) > 0 else os._exit(9)

    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    work()
    os._exit(0)


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_killed_at_any_point_of_publishing_one_whole_checkpoint_is_the_newest(tmp_path: Path, again: bool) -> None:
    moment, outcomes = 0, []
    died = True
    while died:
        run_dir = tmp_path / str(moment)
        for step in (10, 20):
            write_folder(run_dir, step)
        old, new = step_folder(run_dir, 20), step_folder(run_dir, 20 if again else 30)
        fresh = write_folder(tmp_path / f"{moment}_other", 30)
        writing = new.with_name(new.name + ".writing")
        fresh.rename(writing)

        def save(writing: Path = writing, new: Path = new) -> None:
            publish(writing, new)
            prune(new.parent, 1, CheckpointConfig())

        died = dies_at(moment, save)
        recover(new.parent)
        newest = find_checkpoint(run_dir)
        assert newest in (old, new)
        assert find_flip(newest, [DATA_FILE, "config.yaml"]) is None
        outcomes.append(json.loads((newest / "train_state.json").read_text())["step"])
        left = {path.name for path in new.parent.iterdir()}
        assert (new.parent / "latest").read_text().strip() in left
        assert left <= {"latest", "step_00000010", "step_00000020", "step_00000030"}
        # Also what was being deleted is whole or gone.
        assert [find_fault(new.parent / name) for name in left - {"latest"}] == [None] * (len(left) - 1)
        moment += 1
    # First the old one, from some moment on the new one, and never the old one again.
    assert outcomes == sorted(outcomes)
    assert {20, 30} == {*outcomes}
    assert moment > 8
