"""What a run does that is continued with another number of steps, by the kind of its schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards

from megatron_video.cli import run_command
from training.pretrain import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("longer")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").write_text("")
    return root


def run(folder: Path, name: str, steps: int, *overrides: str) -> dict[int, dict[str, Any]]:
    """The last line of metrics.jsonl for every step."""
    settings = [
        *MODEL_OVERRIDES,
        f"run.output_dir={folder / name}",
        f"data.shards=[{folder / 'shards'}]",
        "data.global_batch_size=2",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_steps=2",
        "training.precision=fp32",
        "training.save_every=100",
        f"training.steps={steps}",
    ]
    assert run_command(main, ["--config", str(folder / "empty.yaml"), *settings, *overrides]) == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("loss", "grad_norm", "learning_rate"))


def test_a_constant_run_that_ends_with_wsd_is_the_run_that_was_planned_so(folder: Path) -> None:
    wsd = ["optimizer.decay=wsd", "optimizer.decay_steps=3"]
    planned = run(folder, "planned", 10, *wsd)
    run(folder, "prolonged", 6, "optimizer.decay=constant")
    prolonged = run(folder, "prolonged", 10, *wsd)
    assert all(same(planned[step], prolonged[step]) for step in range(1, 11))
    assert [line["learning_rate"] for line in planned.values()][6:] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 0])


def test_constant_goes_on_and_cosine_is_stretched(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planned = run(folder, "constant", 8)
    run(folder, "short", 5)
    continued = run(folder, "short", 8)
    assert all(same(line, continued[step]) for step, line in planned.items())
    cosine = run(folder, "cosine", 5, "optimizer.decay=cosine")
    assert cosine[5]["learning_rate"] == 0
    capfd.readouterr()
    stretched = run(folder, "cosine", 9, "optimizer.decay=cosine")
    # The rate jumps to where the curve of 9 steps is.
    assert stretched[6]["learning_rate"] == pytest.approx(0.5e-3)
    assert "changed since that checkpoint: training.steps: 5 -> 9" in capfd.readouterr().out
