"""The dry run of VAE training: what is refused and why, and that what is accepted trains and continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vae_clips_on_disk import vae_config, write_clips

from megatron_video.cli import run_command
from megatron_video.config_io import save_config
from training import train_vae

DryRun = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_config(vae_config(write_clips(tmp_path), tmp_path / "vae"), tmp_path / "vae.yaml")
    return tmp_path


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run hides the GPUs from its process, which here is that of all tests."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """(exit code, JSON) of a dry run with further words."""

    def call(*words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        argv = ["train", "--config", str(folder / "vae.yaml"), *words, "--dry-run", "--json"]
        code = run_command(train_vae.main, argv)
        return code, json.loads(capsys.readouterr().out)

    return call


def test_accepted_run_trains_and_continues(folder: Path, dry_run: DryRun) -> None:
    code, found = dry_run()
    assert (code, found["problems"]) == (0, [])
    assert not (folder / "vae").exists()
    assert run_command(train_vae.main, ["train", "--config", str(folder / "vae.yaml")]) == 0
    (checkpoint,) = (folder / "vae" / "checkpoint").iterdir()
    predicted = found["disk"]["checkpoint_bytes"]
    assert predicted < sum(path.stat().st_size for path in checkpoint.rglob("*")) < 1.3 * predicted
    code, found = dry_run()
    assert code == 0
    assert "step 6 of 6" in found["notes"][0]
    code, found = dry_run("learning_rate=1e-4")
    assert code == 2
    assert "learning_rate: 0.001 there, 0.0001 now" in found["problems"][0]


def test_refusals(folder: Path, dry_run: DryRun) -> None:
    (folder / "3.mp4").write_bytes(b"no video")
    code, found = dry_run("initial_weights=nowhere", f"output={folder / '0.mp4' / 'vae'}", "--gpus", "2")
    kinds = [problem.partition(":")[0] for problem in found["problems"]]
    assert code == 2
    assert kinds[0] == "layout"
    assert "a batch of 1 does not divide into 2 ranks" in found["problems"][0]
    assert {"checkpoint", "disk"} <= set(kinds)
    code, found = dry_run("manifest=nowhere.parquet", "stages=[]")
    assert (code, [problem.partition(":")[0] for problem in found["problems"]]) == (2, ["config"])
    assert dry_run("manifest=nowhere.parquet")[1]["problems"][0].startswith("data: ")
    assert dry_run("manifest=nowhere.parquet", "--skip", "data")[0] == 0


def test_zero_cuts_what_ranks_hold(dry_run: DryRun) -> None:
    stages = "stages=[{steps: 1, frames: 1, crop: 16, batch_size: 4, image_batch_size: 4}]"
    held = {}
    for level in (1, 2, 3):
        _, found = dry_run(stages, f"zero_stage={level}", "--gpus", "4")
        held[level] = found["vae_stages"][0]
    count = held[1]["parameters"]
    assert [held[level]["weights"] for level in (1, 2, 3)] == [4 * count, 4 * count, 4 * -(-count // 4)]
    assert [held[level]["gradients"] for level in (1, 2)] == [4 * count, 4 * -(-count // 4)]
