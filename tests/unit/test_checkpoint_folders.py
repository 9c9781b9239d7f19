"""Which checkpoint a path means, and what is refused: half-written, incomplete, foreign and differing ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_video.config_io import load_config, save_config
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from training import checkpoint
from training.checkpoint import TrainState, find_checkpoint, newest_checkpoint, step_folder
from training.config import PretrainConfig


def write_folder(run_dir: Path, step: int) -> Path:
    """A folder as a save leaves it, with one small data file."""
    target = step_folder(run_dir, step)
    writing = target.with_name(target.name + checkpoint.WRITING_SUFFIX)
    writing.mkdir(parents=True)
    (writing / "__0_0.distcp").write_bytes(b"x" * 100)
    save_config(load_config(PretrainConfig, None, ["model.num_layers=2"]), writing / checkpoint.CONFIG_FILE)
    checkpoint._write_state(writing, TrainState(step=step, data_plan={"seed": 1}))
    checkpoint._publish(writing, target)
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
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_00000020"
    assert checkpoint.read_state(newest).step == 20
    assert checkpoint.read_model_config(newest) == DiTConfig(num_layers=2)


def test_a_half_written_checkpoint_is_refused_by_name_and_skipped(
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"x"), "has 1 bytes, written were 100"),
        (lambda folder: (folder / "train_state.json").write_text("{"), "train_state.json is damaged"),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    ],
)
def test_a_checkpoint_that_lost_a_part_is_refused(run_dir: Path, damage: object, message: str) -> None:
    damage(step_folder(run_dir, 20))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        find_checkpoint(step_folder(run_dir, 20))
    assert find_checkpoint(run_dir) == step_folder(run_dir, 10)


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
    checkpoint._prune(run_dir / "checkpoints", keep=2)
    left = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert left == ["step_00000000", "step_00000020", "step_00000030", "step_of_mine"]


def test_saving_a_step_again_replaces_it(run_dir: Path) -> None:
    folder = write_folder(run_dir, 20)
    assert find_checkpoint(folder) == folder
    assert not list((run_dir / "checkpoints").glob("*.replaced"))
