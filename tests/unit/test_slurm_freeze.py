"""A frozen configuration means what the one meant that it was made of."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from slurm.checks import file_system, show_time
from slurm.scheduler import parse_time
from slurm.snapshot import source_root
from slurm.submit_training import TRAININGS, Caller, resolve


@pytest.mark.heavy
def test_frozen_curriculum_has_the_same_stages(tmp_path: Path) -> None:
    """Its presets are gone from it; what each stage takes from the one before is not."""
    training, caller = TRAININGS["curriculum"], Caller(tmp_path, source_root())
    overrides = ["output_dir=out", "common.data.shards=[shards]"]
    stages = resolve(training, "tiny", overrides, caller)
    assert training.output(stages) == "out"
    frozen = training.relocated(deepcopy(stages), str(tmp_path / "out"))
    (tmp_path / "frozen.yaml").write_text(yaml.safe_dump(frozen, sort_keys=False))
    again = resolve(training, "frozen.yaml", [], caller)
    text = yaml.safe_dump(stages).replace("output_dir: out/", f"output_dir: {tmp_path}/out/")
    assert again == yaml.safe_load(text.replace("initial_weights: out/", f"initial_weights: {tmp_path}/out/"))
    assert "preset" not in (tmp_path / "frozen.yaml").read_text()


@pytest.mark.parametrize("text", ["00:10:00", "23:59:59", "1-12:00:00", "10-00:00:01"])
def test_times_are_read_as_they_are_shown(text: str) -> None:
    seconds = parse_time(text)
    assert seconds is not None
    assert show_time(seconds) == text


def test_file_systems() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/dev/shm")) == "tmpfs"
