"""Real ranks, one of them slowed down: it is named with the phase in which it is slow, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_runs import run_without_launcher
from tiny_shards import write_tiny_shards

from training.events import read_events

pytestmark = pytest.mark.distributed

SETTINGS = ["training.steps=22", "training.save_every=100", "faults.straggler_every=10", "faults.straggler_ratio=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slow")
    write_tiny_shards(root / "shards")
    return root


@pytest.mark.parametrize(
    ("phase", "fault"),
    [
        ("data", {"kind": "sleep", "rank": 1, "step": 0, "last": 1000, "seconds": 0.5}),
        pytest.param("forward_backward", {"kind": "slow_forward", "rank": 0, "seconds": 0.3}, marks=pytest.mark.heavy),
    ],
)
def test_the_slow_rank_is_named_and_no_other(folder: Path, phase: str, fault: dict[str, Any]) -> None:
    (code_0, output_0), (code_1, output_1) = run_without_launcher(folder, phase, *SETTINGS, faults=[fault])
    assert (code_0, code_1) == (0, 0), output_0 + output_1
    # The probe takes its own view of a machine that has other work.
    events = [event for event in read_events(folder / phase, "straggler") if event["phase"] != "probe"]
    # Compared at steps 10 and 20.
    assert [(event["slow_rank"], event["phase"], event["step"]) for event in events] == [
        (fault["rank"], phase, 11),
        (fault["rank"], phase, 21),
    ]
    assert events[0]["coordinates"]["dp"] == fault["rank"]
    assert events[0]["ratio"] > 2
    assert f"SLOW rank {fault['rank']}" in output_0
