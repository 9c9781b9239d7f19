"""A run whose checkpoints cannot be written: what it does about it, and what it leaves."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_pretrain_resume import command
from tiny_shards import write_tiny_shards

from training.checkpoint_folders import newest_checkpoint
from training.events import read_events

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("errors")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").write_text("")
    return root


def run_with_small_files(folder: Path, name: str, *overrides: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run that can write records but no file of 64 KiB, as on a disk that is nearly full."""
    settings = [f"training.steps={STEPS}", "training.save_every=3", "optimizer.warmup_steps=0", *overrides]
    program = shlex.join(command(folder, name, *settings, ranks=1))
    done = subprocess.run(
        ["bash", "-c", f"ulimit -S -f 64; exec {program}"], capture_output=True, text=True, timeout=240, check=False
    )
    return done, folder / name


def status(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return values


def test_a_failed_save_stops_the_run_soon_and_names_the_file(folder: Path) -> None:
    done, run_dir = run_with_small_files(folder, "stops")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "CheckpointError" in done.stderr
    assert "step_00000003 FAILED: rank 0: cannot write" in done.stdout
    assert ".distcp: File too large" in done.stdout
    assert status(run_dir)["state"] == "failed"
    assert 3 <= status(run_dir)["step"] < STEPS
    (event,) = read_events(run_dir, "save_failed")
    assert event["reason"] in done.stdout
    assert newest_checkpoint(run_dir / "checkpoints") is None


def test_asked_to_go_on_it_tries_again_but_does_not_end_as_if_it_had_saved(folder: Path) -> None:
    done, run_dir = run_with_small_files(folder, "goes_on", "checkpoint.on_error=continue")
    assert done.returncode == 1, done.stdout + done.stderr
    assert status(run_dir) == {"state": "failed", "step": STEPS}
    assert [event["step"] for event in read_events(run_dir, "save_failed")] == [3, 6, 9, 12]
