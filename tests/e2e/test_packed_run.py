"""A run whose micro-batches are packed has the curve of the one whose are not."""

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
    root = tmp_path_factory.mktemp("packed")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").write_text("")
    return root


def run(folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    settings = [
        *MODEL_OVERRIDES,
        f"run.output_dir={folder / name}",
        f"data.shards=[{folder / 'shards'}]",
        "data.micro_batch_size=2",
        "data.global_batch_size=8",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_steps=2",
        "training.precision=fp32",
        "training.steps=8",
    ]
    assert run_command(main, ["--config", str(folder / "empty.yaml"), *settings, *overrides]) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tokens", [90, 1000])
def test_packing_does_not_change_the_curve(folder: Path, tokens: int) -> None:
    plain, packed = run(folder, f"plain_{tokens}"), run(folder, f"packed_{tokens}", f"data.pack_tokens={tokens}")
    assert len(plain) == len(packed) == 8
    for one, other in zip(plain, packed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other["positions_by_time"] == one["positions_by_time"]
        assert other["tokens"] == one["tokens"]


def test_packing_is_refused_where_it_cannot_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["parallel.use_megatron_fsdp=true"], "Megatron-FSDP gathers weights"),
        (["parallel.context_parallel_size=2", "parallel.cp_comm_type=all_gather"], "only a2a brings"),
        (["model.hidden_dropout=0.1"], "hidden_dropout=0.1"),
        (["data.pack_tokens=0"], "pack_tokens=0"),
    ]
    for overrides, message in cases:
        arguments = ["--config", str(folder / "empty.yaml"), "data.pack_tokens=100", *overrides]
        assert run_command(main, arguments) == 2
        assert message in capsys.readouterr().err
