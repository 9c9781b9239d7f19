"""A run whose data holds a bad window goes back, leaves it out, and then is the run that never met it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fault_runs import SETTINGS, run, run_without_launcher
from tiny_shards import write_tiny_shards

from megatron_video.cli import run_command
from training.checkpoint import read_state, step_folder
from training.data import StepBatches, StepData
from training.diverged import DIVERGED_EXIT_CODE
from training.events import read_events
from training.pretrain import main

STEPS = 30
# Data steps whose targets are far too large; three of them in a row make the run go back.
BAD = range(16, 19)
POLICY = [
    "faults.spike_mads=8",
    "faults.spike_window=10",
    "faults.spike_steps=3",
    "faults.spike_back=2",
    f"training.steps={STEPS}",
    "ema.decay=0.9",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spikes")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").touch()
    return root


@pytest.fixture
def bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    build = StepBatches.__getitem__

    def build_badly(self: StepBatches, step: int) -> StepData:
        data = build(self, step)
        if step in BAD:
            for batch in data.batches:
                batch.target.mul_(30)
        return data

    monkeypatch.setattr(StepBatches, "__getitem__", build_badly)


def train(folder: Path, name: str, *overrides: str) -> int:
    files = [f"run.output_dir={folder / name}", f"data.shards=[{folder / 'shards'}]"]
    return run_command(main, ["--config", str(folder / "empty.yaml"), *SETTINGS, *POLICY, *files, *overrides])


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder, name)}


def kinds(folder: Path, name: str) -> list[str]:
    return [event["event"] for event in read_events(folder / name) if event["event"] not in ("save", "validation")]


@pytest.fixture
def without_the_window(folder: Path) -> dict[int, float]:
    """The curve of a run that leaves the window out from the beginning, on good data."""
    if not (folder / "clean").exists():
        assert train(folder, "clean", "faults.skip_data_steps=[[14,19]]", "faults.spike_mads=null") == 0
    return losses(folder, "clean")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_a_spike_is_rolled_back_and_its_data_left_out(
    folder: Path, bad_data: None, without_the_window: dict[int, float], sharded: str
) -> None:
    name = f"spike_{sharded}"
    assert train(folder, name, f"parallel.use_distributed_optimizer={sharded}") == 0
    assert kinds(folder, name) == ["start", "spike", "spike", "spike", "rollback", "stop"]
    (rollback,) = read_events(folder / name, "rollback")
    assert [line["rollbacks"] for line in lines(folder, name)] == [0] * 19 + [1] * 20
    # Three spikes and two steps before them; the checkpoint of step 15 lies behind step 14.
    assert (rollback["from_step"], rollback["step"], rollback["skipped"]) == (19, 10, [14, 19])
    found = losses(folder, name)
    # Bit for bit; cut over replicas, the optimizer adds up in another order.
    expected = without_the_window if sharded == "false" else pytest.approx(without_the_window, rel=1e-5)
    assert found == expected
    state = read_state(step_folder(folder / name, STEPS))
    assert (state.skipped_data, state.rollbacks) == ([[14, 19]], [19])


def test_a_resume_after_the_rollback_goes_on_with_the_same_data(
    folder: Path, bad_data: None, without_the_window: dict[int, float]
) -> None:
    # Up to step 20, which has gone back from 19 to 10 on its way.
    assert train(folder, "resumed", "training.steps=20") == 0
    assert train(folder, "resumed") == 0
    assert kinds(folder, "resumed").count("rollback") == 1
    assert losses(folder, "resumed") == without_the_window


def test_a_run_killed_between_rollback_and_save_goes_back_again(
    folder: Path, bad_data: None, without_the_window: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Not caught by anything."""

    from training import loop

    roll_back = loop.roll_back_if_needed

    def roll_back_and_die(trainer: Any) -> bool:
        if roll_back(trainer):
            raise KilledError
        return False

    with monkeypatch.context() as patch:
        patch.setattr(loop, "roll_back_if_needed", roll_back_and_die)
        with pytest.raises(KilledError):
            train(folder, "killed")
    # What the spike wrote is gone, so nobody can start from it.
    assert not step_folder(folder / "killed", 15).exists()
    assert (folder / "killed" / "checkpoints" / "latest").read_text().strip() == "step_00000010"
    assert train(folder, "killed") == 0
    assert losses(folder, "killed") == without_the_window
    assert read_state(step_folder(folder / "killed", STEPS)).rollbacks == [19]


@pytest.mark.heavy
@pytest.mark.distributed
def test_several_ranks_go_back_together_and_one_goes_on_alone(
    folder: Path, without_the_window: dict[int, float]
) -> None:
    bad = {"kind": "scale", "rank": None, "step": BAD[0], "last": BAD[-1], "factor": 30}
    two_ranks = [*POLICY, "parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]
    overlapped = [*two_ranks, "parallel.overlap_param_gather=true"]
    codes = run_without_launcher(folder, "ranks", *overlapped, "training.steps=20", faults=[bad])
    assert [code for code, _ in codes] == [0, 0], codes
    assert kinds(folder, "ranks").count("rollback") == 1
    # On one rank, with the bad data, which it never meets.
    assert run(folder, "ranks", *POLICY, faults=[bad], ranks=1).returncode == 0
    assert kinds(folder, "ranks").count("rollback") == 1
    assert losses(folder, "ranks") == pytest.approx(without_the_window, rel=1e-5)


def test_too_many_rollbacks_stop_the_run(folder: Path, bad_data: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "too_many", "faults.spike_max_rollbacks=0") == DIVERGED_EXIT_CODE
    assert "spike_max_rollbacks=0" in capsys.readouterr().out
    assert json.loads((folder / "too_many" / "status.json").read_text())["state"] == "failed"


def test_without_a_checkpoint_before_the_spike_the_run_goes_on(folder: Path, bad_data: None) -> None:
    assert train(folder, "none_before", "training.save_every=100") == 0
    assert kinds(folder, "none_before") == ["start", "spike", "spike", "spike", "rollback_impossible", "stop"]
