"""Which checkpoint a path means, and what is refused: half-written, damaged, foreign and differing ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from checkpoints_tools.verify import checkpoints_of, verify
from megatron_video.config_io import load_config, save_config
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from training import checkpoint, checkpoint_files, checkpoint_folders
from training.checkpoint import TrainState, find_checkpoint, newest_checkpoint, step_folder
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_files import find_fault, find_flip, stored_file
from training.checkpoint_folders import prune, recover
from training.checkpoint_retention import HOUR, Stored, deletable
from training.config import PretrainConfig

DATA_FILE = "__0_0.distcp"


def write_folder(run_dir: Path, step: int, written: float | None = None) -> Path:
    """A folder as a save leaves it, with one small data file."""
    target = step_folder(run_dir, step)
    writing = target.with_name(target.name + checkpoint_files.WRITING_SUFFIX)
    writing.mkdir(parents=True)
    (writing / DATA_FILE).write_bytes(b"x" * 100)
    save_config(load_config(PretrainConfig, None, ["model.num_layers=2"]), writing / checkpoint_files.CONFIG_FILE)
    files = {path.name: stored_file(path) for path in writing.iterdir()}
    state = asdict(TrainState(step=step, data_plan={"seed": 1}))
    checkpoint_files.write_state(writing, state | {"written": written or time.time()}, files)
    checkpoint_folders.publish(writing, target)
    return target


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20):
        write_folder(tmp_path, step)
    return tmp_path


def test_run_checkpoints_and_step_folders_are_found(run_dir: Path) -> None:
    newest = step_folder(run_dir, 20)
    assert find_checkpoint(run_dir) == find_checkpoint(run_dir / "checkpoints") == find_checkpoint(newest) == newest
    assert find_checkpoint(step_folder(run_dir, 10)) == step_folder(run_dir, 10)
    assert newest_checkpoint(run_dir / "checkpoints", up_to_step=19) == step_folder(run_dir, 10)
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_00000020"
    assert checkpoint.read_state(newest) == TrainState(step=20, data_plan={"seed": 1})
    assert checkpoint.read_model_config(newest) == DiTConfig(num_layers=2)


def test_what_never_was_a_checkpoint_is_refused_by_name_and_skipped(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = step_folder(run_dir, 30)
    (half / "nothing").mkdir(parents=True)
    with pytest.raises(UserError, match=r"step_00000030 is not a complete checkpoint: it has no train_state.json"):
        find_checkpoint(half)
    assert newest_checkpoint(run_dir / "checkpoints") == step_folder(run_dir, 20)
    assert "step_00000030" in caplog.text


def test_an_interrupted_write_is_refused(run_dir: Path) -> None:
    writing = step_folder(run_dir, 20).rename(run_dir / "checkpoints" / "step_00000020.writing")
    with pytest.raises(UserError, match=r"20\.writing is not a complete checkpoint: its writing was interrupted"):
        find_checkpoint(writing)
    assert find_checkpoint(run_dir) == step_folder(run_dir, 10)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_state(folder: Path) -> None:
    path = folder / "train_state.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / DATA_FILE).unlink(), "__0_0.distcp is missing"),
        (lambda folder: (folder / DATA_FILE).write_bytes(b"x"), "has 1 bytes, written were 100"),
        (lambda folder: (folder / "train_state.json").write_text("{"), "train_state.json is damaged"),
        (change_state, "train_state.json is damaged .its digest differs"),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    ],
)
def test_a_checkpoint_that_lost_a_part_is_refused_by_name(
    run_dir: Path, damage: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(step_folder(run_dir, 20))
    for path in (step_folder(run_dir, 20), run_dir):
        with pytest.raises(UserError, match=rf"step_00000020 .*{message}"):
            find_checkpoint(path)
    # Only who asks for it gets an older one, and is told.
    older = newest_checkpoint(run_dir / "checkpoints", older_if_damaged=True)
    assert older == step_folder(run_dir, 10)
    assert "ignoring" in caplog.text


def test_without_its_state_file_a_published_checkpoint_is_damaged_too(run_dir: Path) -> None:
    newest = step_folder(run_dir, 20)
    (newest / ".metadata").write_bytes(b"")
    (newest / "train_state.json").unlink()
    with pytest.raises(UserError, match=r"step_00000020 is damaged: it has no train_state.json"):
        find_checkpoint(run_dir)


def test_every_flipped_bit_shows_in_the_checksums(run_dir: Path) -> None:
    newest = step_folder(run_dir, 20)
    assert find_flip(newest, [DATA_FILE, "config.yaml"]) is None
    flip(newest / DATA_FILE)
    assert find_fault(newest) is None  # sizes alone do not tell
    assert "__0_0.distcp has checksum" in str(find_flip(newest, ["config.yaml", DATA_FILE]))


def test_checkpoints_of_versions_without_checksums_are_read(run_dir: Path) -> None:
    path = step_folder(run_dir, 20) / "train_state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in content if name not in ("checksums", "digest")}))
    assert find_checkpoint(run_dir) == path.parent
    assert find_flip(path.parent, [DATA_FILE]) is None


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        find_checkpoint(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "absent") is None


def test_other_model_and_data_are_refused_by_field(run_dir: Path) -> None:
    folder = step_folder(run_dir, 20)
    checkpoint.check_same_model(folder, DiTConfig(num_layers=2))
    with pytest.raises(UserError, match="num_layers: 2 there, 3 here"):
        checkpoint.check_same_model(folder, DiTConfig(num_layers=3))
    with pytest.raises(UserError, match="seed: 1 there, 2 here"):
        checkpoint.check_same_data_plan(folder, {"seed": 2})


def test_only_the_newest_are_kept(run_dir: Path) -> None:
    for step in (0, 30):
        write_folder(run_dir, step)
    (run_dir / "checkpoints" / "step_of_mine").mkdir()
    assert prune(run_dir / "checkpoints", 2, CheckpointConfig()) == [step_folder(run_dir, 10)]
    left = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert left == ["step_00000000", "step_00000020", "step_00000030", "step_of_mine"]


def test_the_age_is_the_one_written_in_the_checkpoint(run_dir: Path) -> None:
    now = time.time()
    for step, age in ((30, 50), (40, 49.9), (50, 2), (60, 1)):
        write_folder(run_dir, step, now - age * HOUR)
    settings = CheckpointConfig(keep_one_per_hours=24)
    gone = {path.name for path in prune(run_dir / "checkpoints", 1, settings)}
    assert "step_00000060" not in gone
    assert "step_00000030" not in gone
    assert "step_00000040" in gone


def kept(settings: CheckpointConfig, keep: int, hours: list[float], now: float = 1000.0) -> list[int]:
    """Steps 100, 200, ... that were complete at these hours, and are left."""
    stored = [Stored(Path(), 100 * (number + 1), hour * HOUR) for number, hour in enumerate(hours)]
    gone = deletable(stored, keep, settings, now * HOUR)
    return [item.step for item in stored if item not in gone]


def test_rules_of_count_step_and_age() -> None:
    hours = [0.0, 1, 23, 24.5, 25, 47, 48.1, 49]
    assert kept(CheckpointConfig(), 2, hours) == [700, 800]
    assert kept(CheckpointConfig(), 0, hours) == [100 * number for number in range(1, 9)]
    assert kept(CheckpointConfig(keep_every=300), 1, hours) == [300, 600, 800]
    assert kept(CheckpointConfig(keep_one_per_hours=24), 1, hours) == [100, 400, 700, 800]
    # Those kept for their age go with it; those kept by their step never do.
    rules = CheckpointConfig(keep_one_per_hours=24, delete_after_hours=30, keep_every=200)
    assert kept(rules, 1, hours, now=50) == [200, 400, 500, 600, 700, 800]


def test_whichever_is_kept_for_its_age_stays_so_while_new_ones_come() -> None:
    settings, stored = CheckpointConfig(keep_one_per_hours=10), []
    for number in range(1, 60):
        stored.append(Stored(Path(), number, number * HOUR))
        gone = deletable(stored, 2, settings, number * HOUR)
        stored = [item for item in stored if item not in gone]
    assert [item.step for item in stored] == [1, 10, 20, 30, 40, 50, 58, 59]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"files_per_rank": 0}, "files_per_rank=0"),
        ({"max_wait_seconds": 0}, "max_wait_seconds=0"),
        ({"keep_every": -1}, "keep_every=-1"),
        ({"delete_after_hours": 5}, "deletes what keep_one_per_hours keeps"),
        ({"delete_after_hours": -5, "keep_one_per_hours": 1}, "delete_after_hours=-5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**values)


def test_saving_a_step_again_replaces_it(run_dir: Path) -> None:
    folder = write_folder(run_dir, 20)
    assert find_checkpoint(folder) == folder
    assert not list((run_dir / "checkpoints").glob("*.replaced"))


def test_what_a_killed_job_left_is_put_right(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    step_folder(run_dir, 20).rename(root / "step_00000020.replaced")
    step_folder(run_dir, 10).rename(root / "step_00000010.deleting")
    (root / "step_00000030.writing").mkdir()
    recover(root)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000020"]
    assert find_checkpoint(run_dir) == step_folder(run_dir, 20)


def test_every_file_that_is_wrong_is_named(run_dir: Path) -> None:
    told: list[str] = []
    assert all(verify(folder, tell=told.append).whole for folder in checkpoints_of(run_dir, every=True))
    assert told[-1].startswith("step_00000020: 2/2 files, 0.000 of 0.000 GB")
    older = step_folder(run_dir, 10)
    flip(older / DATA_FILE)
    (older / "config.yaml").unlink()
    assert [verify(folder).whole for folder in checkpoints_of(run_dir, every=False)] == [True]
    damaged, whole = (verify(folder) for folder in checkpoints_of(run_dir, every=True))
    assert (damaged.folder, whole.faults) == (str(older), [])
    assert [fault.split()[:3] for fault in damaged.faults] == [
        [DATA_FILE, "has", "checksum"],
        ["config.yaml", "is", "missing"],
    ]


def test_verify_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints_of(tmp_path, every=False)
