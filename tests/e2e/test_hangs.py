"""Real ranks that get stuck: the right one is named, stacks are left, the job ends in time and can be restarted."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fault_runs import losses, run, run_without_launcher
from tiny_shards import write_tiny_shards

from training.events import read_events
from training.watchdog import HANG_EXIT_CODE

pytestmark = pytest.mark.distributed

STEPS, HANG_SECONDS = 10, 4
LIMITS = [f"training.steps={STEPS}", f"faults.hang_seconds={HANG_SECONDS}", "faults.hang_seconds_start=100"]
# Built while step 5 or 6 is trained: the loader is two steps ahead.
STEP = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hangs")
    write_tiny_shards(root / "shards")
    return root


def only_culprit(run_dir: Path) -> dict[str, Any]:
    (event,) = read_events(run_dir, "hang")
    (culprit,) = event["culprits"]
    return {**culprit, "step": event["step"], "stacks": event["stacks"]}


def stacks(culprit: dict[str, Any], rank: int) -> str:
    return (Path(culprit["stacks"]) / f"rank_{rank:05d}.stacks.txt").read_text()


def seconds_to_name(run_dir: Path) -> float:
    """From the last line of a finished step to the verdict."""
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["time"]
    return datetime.fromisoformat(read_events(run_dir, "hang")[0]["time"]).timestamp() - last


@pytest.mark.heavy
def test_a_rank_that_sleeps_in_the_loader_is_named(folder: Path) -> None:
    sleeping = {"kind": "sleep", "rank": 1, "step": STEP, "seconds": 1000}
    (code_0, output_0), (code_1, output_1) = run_without_launcher(folder, "loader", *LIMITS, faults=[sleeping])
    assert (code_0, code_1) == (HANG_EXIT_CODE, HANG_EXIT_CODE), output_0 + output_1
    culprit = only_culprit(folder / "loader")
    assert (culprit["rank"], culprit["coordinates"]["dp"], culprit["step"]) == (1, 1, STEP)
    assert f"in data of step {STEP + 1}" in culprit["why"]
    assert "faulty_pretrain.py" in culprit["why"]  # where the loader's thread is
    assert f"HANG at step {STEP + 1}: rank 1" in output_0 + output_1
    assert "finish_grad_sync" in stacks(culprit, 0)
    assert "in sleep" in stacks(culprit, 1)
    assert json.loads((folder / "loader" / "status.json").read_text()) == {"state": "hung", "step": STEP}
    assert HANG_SECONDS < seconds_to_name(folder / "loader") < HANG_SECONDS + 10


def test_a_stopped_rank_is_named_by_the_others(folder: Path) -> None:
    stopped = {"kind": "send", "rank": 0, "step": STEP, "signal": "SIGSTOP"}
    _, (code_1, output_1) = run_without_launcher(folder, "stopped", *LIMITS, faults=[stopped])
    assert code_1 == HANG_EXIT_CODE, output_1
    culprit = only_culprit(folder / "stopped")
    assert culprit["rank"] == 0
    assert culprit["why"] == f"gave no sign of life; its process {culprit['pid']} is stopped"
    # In which collective it waits depends on where the loader's thread stopped the other.
    assert "in train_step" in stacks(culprit, 1)


@pytest.mark.heavy
def test_in_tensor_and_data_parallel_groups_the_rank_that_holds_all_others_up_is_named(folder: Path) -> None:
    # Rank 2 stops in a forward pass; 3 waits for it in a layer, 0 and 1 in the reduction over replicas.
    stuck = {"kind": "slow_forward", "rank": 2, "after": 12, "seconds": 1000}
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    codes = run_without_launcher(folder, "groups", *LIMITS, *layout, faults=[stuck], count=4)
    assert [code for code, _ in codes] == [HANG_EXIT_CODE] * 4, codes
    culprit = only_culprit(folder / "groups")
    assert (culprit["rank"], culprit["coordinates"]) == (2, {"tp": 0, "cp": 0, "dp": 1, "pp": 0})
    assert "forward_slowly" in culprit["why"]


@pytest.mark.heavy
def test_a_pipeline_stage_that_holds_the_other_up_is_named(folder: Path) -> None:
    stuck = {"kind": "slow_forward", "rank": 1, "after": 12, "seconds": 1000}
    layout = ["parallel.pipeline_model_parallel_size=2"]
    codes = run_without_launcher(folder, "stages", *LIMITS, *layout, faults=[stuck])
    assert [code for code, _ in codes] == [HANG_EXIT_CODE] * 2, codes
    assert only_culprit(folder / "stages")["rank"] == 1


@pytest.mark.heavy
def test_a_job_ends_also_where_nothing_can_be_written(folder: Path) -> None:
    sleeping = {"kind": "sleep", "rank": 1, "step": STEP, "seconds": 1000}
    (folder / "unwritable").mkdir()
    # A file in the place of the folder: as good as a full disk, also for root.
    (folder / "unwritable" / "hangs").touch()
    codes = run_without_launcher(folder, "unwritable", *LIMITS, faults=[sleeping])
    assert [code for code, _ in codes] == [HANG_EXIT_CODE, HANG_EXIT_CODE], codes
    assert all("could not report" in output and "most recent call first" in output for _, output in codes)


@pytest.mark.heavy
def test_the_launcher_restarts_a_hung_job(folder: Path) -> None:
    sleeping = {"kind": "sleep", "rank": 1, "step": STEP, "seconds": 1000}
    launch = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    result = run(folder, "restarted", *LIMITS, faults=[sleeping], launch=launch)
    assert result.returncode == 0, result.stdout
    assert f"(exitcode: {HANG_EXIT_CODE})" in result.stdout
    assert [event["event"] for event in read_events(folder / "restarted") if event["event"] != "save"] == [
        "start",
        "hang",
        "resume",
        "stop",
    ]
    assert sorted(losses(folder / "restarted")) == list(range(1, STEPS + 1))


@pytest.mark.heavy
def test_a_sleeping_loader_process_is_named_with_its_stack(folder: Path) -> None:
    sleeping = {"kind": "sleep", "rank": 1, "step": STEP, "seconds": 1000}
    codes = run_without_launcher(folder, "worker", *LIMITS, "data.workers=1", faults=[sleeping])
    assert [code for code, _ in codes] == [HANG_EXIT_CODE, HANG_EXIT_CODE], codes
    culprit = only_culprit(folder / "worker")
    assert culprit["rank"] == 1
    assert "loader: worker" in culprit["why"]
    assert "in sleep" in stacks(culprit, 1).split("loader workers")[1]


@pytest.mark.heavy
def test_a_killed_loader_process_is_an_error_and_no_hang(folder: Path) -> None:
    killed = {"kind": "send", "rank": 1, "step": STEP, "signal": "SIGKILL"}
    result = run(folder, "died", *LIMITS, "data.workers=1", faults=[killed])
    assert result.returncode == 1
    assert "is killed by signal: Killed" in result.stdout
    assert read_events(folder / "died", "hang") == []
