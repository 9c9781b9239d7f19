"""`megatron-video demo` at its smallest: every step for real, killed, resumed, converted, sampled, measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SMALLEST = [
    "clips=24",
    'vae=["stages=[{steps: 2, frames: 17, crop: 32, batch_size: 1}]", "warmup_steps=1"]',
    'pretrain=["training.steps=10", "training.save_every=4", "training.log_every=1", "optimizer.warmup_steps=2",'
    ' "model.num_layers=2", "data.global_batch_size=4", "data.micro_batch_size=4"]',
    "samples=6",
    "sampling_steps=2",
    # Ten steps teach nothing; what is tested is that everything runs, resumes and is measured.
    "required_accuracy=0",
]


def run_demo(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_video", "demo", "--out", str(out), "--json", "--config", *SMALLEST]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)


def test_the_whole_path(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run_demo(out)
    assert result.returncode == 0, result.stderr[-6000:]
    summary = json.loads(result.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["failed_checks"] == []
    assert summary["raw"]["clips_dropped"]["ingest"] == 1
    assert summary["resume_check"]["passed"]
    assert summary["resume_check"]["max_loss_difference"] == 0
    assert summary["resume_check"]["missing_steps"] == []
    assert summary["conversion_check"]["equal"]
    assert summary["accuracy"]["real"]["both"]["accuracy"] == 1
    assert summary["accuracy"]["trained"]["videos"] == summary["accuracy"]["untrained"]["videos"] == 6
    for sheet in summary["contact_sheets"].values():
        assert Path(sheet).stat().st_size > 10_000
    # A second call finds everything done, and computes the same summary from it.
    again = run_demo(out)
    assert again.returncode == 0
    assert again.stderr.count("done before") == len(summary["steps"])
    volatile = {"finished": None, "git_revision": None}
    assert {**json.loads(again.stdout), **volatile} == {**summary, **volatile}
