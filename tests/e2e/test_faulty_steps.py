"""The end of a job's time, and steps that are refused: what is saved, and what is named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fault_runs import SETTINGS
from tiny_shards import write_tiny_shards

from megatron_video.cli import run_command
from training.checkpoint import read_state
from training.data import StepBatches, StepData
from training.diverged import DIVERGED_EXIT_CODE
from training.events import read_events
from training.pretrain import main
from training.stop_signal import REQUEUE_EXIT_CODE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faulty_steps")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").touch()
    return root


def train(folder: Path, name: str, *overrides: str) -> int:
    files = [f"run.output_dir={folder / name}", f"data.shards=[{folder / 'shards'}]"]
    return run_command(main, ["--config", str(folder / "empty.yaml"), *SETTINGS, *files, *overrides])


def test_a_job_saves_and_leaves_before_its_time_is_over(folder: Path) -> None:
    seconds, reserve = 12.0, 6.0
    begin = time.time()
    limits = [f"faults.wall_time={seconds / 60}", f"faults.wall_time_reserve={reserve}", "training.steps=1000000"]
    assert train(folder, "timed", *limits, "training.save_every=1000000") == REQUEUE_EXIT_CODE
    assert time.time() - begin < seconds + 2  # two seconds for starting and closing
    (stop,) = read_events(folder / "timed", "stop")
    assert (stop["state"], stop["reason"]) == ("stopped", "wall time")
    (save,) = read_events(folder / "timed", "save")
    assert save["step"] == stop["step"] > 0
    assert read_state(Path(save["checkpoint"])).step == stop["step"]


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range, value: float) -> dict[int, list[Any]]:
    """Make the second micro-batch of these data steps not finite.

    Returns:
        What it was planned from, by data step, filled while training.
    """
    build, planned = StepBatches.__getitem__, {}

    def build_badly(self: StepBatches, step: int) -> StepData:
        data = build(self, step)
        if step in steps:
            data.batches[1].target.view(-1)[0] = value
            planned[step] = [data.planned[1].bucket, [self.builder.data.where(int(s)) for s in data.planned[1].samples]]
        return data

    monkeypatch.setattr(StepBatches, "__getitem__", build_badly)
    return planned


def test_a_refused_step_names_the_samples_of_the_batch_that_was_not_finite(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = spoil(monkeypatch, range(4, 5), float("nan"))
    assert train(folder, "refused", "training.steps=8") == 0
    (event,) = read_events(folder / "refused", "refused_step")
    assert (event["step"], event["loss"], event["in_a_row"]) == (5, "nan", 1)
    (batch,) = event["batches"]
    assert [batch["bucket"], batch["samples"]] == planned[4]
    assert (batch["replica"], batch["micro_batch"]) == (0, 1)
    assert planned[4][1][0] in capsys.readouterr().out


def test_too_many_refused_steps_end_with_a_code_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(4, 100), float("inf"))
    assert train(folder, "diverged", "training.steps=50", "training.max_refused_steps=3") == DIVERGED_EXIT_CODE
    assert json.loads((folder / "diverged" / "status.json").read_text()) == {"state": "failed", "step": 7}
    assert [event["in_a_row"] for event in read_events(folder / "diverged", "refused_step")] == [1, 2, 3]
