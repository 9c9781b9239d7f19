"""Samples that cannot be read, on all ranks or on one: left out alike in any layout, and no rank waits for ever."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import corrupt_worker
import pytest
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards

from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.shards import ShardDataset
from training.config import PretrainConfig
from training.data_set import TrainingData
from training.events import read_events
from training.local_ranks import RankPool
from training.run_plan import plan_run

STEPS = 6
LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "CP2": ["parallel.context_parallel_size=2"],
}


@dataclass(frozen=True)
class Damaged:
    """One data set twice, whole and damaged, and what a single process makes of the damaged one."""

    whole: Path
    damaged: Path
    keys: list[str]
    """Samples that cannot be read any more."""
    metrics: list[dict[str, float]]
    events: set[str]
    """Keys that the single process told of."""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Damaged:
    folder = tmp_path_factory.mktemp("corrupt")
    whole, broken = (write_tiny_shards(folder / name) for name in ("whole", "damaged"))
    _damage(broken)
    keys = _unreadable(broken)
    assert 5 < len(keys) < 20
    run = folder / "alone"
    (end,) = ranks.run(corrupt_worker.train, settings(broken), str(run), ranks=1)
    assert end == "exit 0"
    return Damaged(whole, broken, keys, metrics(run), told(run))


def _damage(folder: Path) -> None:
    """A flipped byte in three samples of one shard, and another shard cut off in the middle."""
    flipped, cut, _ = sorted(folder.glob("*.tar"))
    content = bytearray(flipped.read_bytes())
    index = ShardDataset(folder).index
    for row, place in ((2, "latent_offset"), (5, "text_offset"), (9, "json_offset")):
        content[index[place][row].as_py() + 20] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])


def _unreadable(folder: Path) -> list[str]:
    dataset, keys = ShardDataset(folder), []
    for number in range(len(dataset)):
        try:
            dataset[number]
        except UserError:
            keys.append(dataset.rows.row(number).key)
    return keys


def settings(shards: Path, most: int = 100) -> list[str]:
    data = [f"data.shards=[{shards}]", "data.global_batch_size=6", "data.micro_batch_size=2", "data.read_attempts=1"]
    run = ["training.precision=fp32", f"training.steps={STEPS}", "optimizer.warmup_steps=0", "run.seed=3"]
    return [*MODEL_OVERRIDES, *data, *run, f"data.max_corrupt_samples={most}", "model.use_additional_conditions=true"]


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "grad_norm")} for line in lines]


def told(run: Path) -> set[str]:
    return {event["key"].rsplit(" ", 1)[1] for event in read_events(run, "corrupt_sample")}


def test_every_unreadable_sample_that_was_drawn_is_told_of_and_some_batches_are_empty(damaged: Damaged) -> None:
    config = load_config(PretrainConfig, None, settings(damaged.damaged))
    data = TrainingData.open(config.data)
    plan = plan_run(config, data)
    batches = [[data.where(int(s)).rsplit(" ", 1)[1] for s in b.samples] for k in range(STEPS) for b in plan.step(k)]
    assert damaged.events == {key for batch in batches for key in batch} & {*damaged.keys}
    # Else the stand-in for an empty micro-batch would not be tried here.
    assert any({*batch} <= {*damaged.keys} for batch in batches)
    assert [line["step"] for line in damaged.metrics] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_read_that_fails_on_one_rank_only_changes_nothing_else(
    damaged: Damaged, ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    overrides = settings(damaged.whole) + LAYOUTS[layout]
    run = str(tmp_path / "run")
    ends = ranks.run(corrupt_worker.train, overrides, run, damaged.keys, [1], ranks=2, timeout_seconds=120)
    assert ends == ["exit 0"] * 2
    assert told(tmp_path / "run") == damaged.events
    for ours, alone in zip(metrics(tmp_path / "run"), damaged.metrics, strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)


def test_damaged_files_are_told_of_by_one_rank_of_a_replica(damaged: Damaged, ranks: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = settings(damaged.damaged) + LAYOUTS["TP2"]
    ends = ranks.run(corrupt_worker.train, overrides, str(run), ranks=4, timeout_seconds=120)
    assert ends == ["exit 0"] * 4
    events = read_events(run, "corrupt_sample")
    assert {event["rank"] for event in events} <= {0, 2}
    state = json.loads(next((run / "checkpoints").glob("step_*6/train_state.json")).read_text())
    assert state["corrupt_samples"] == len(events) > 0
    for ours, alone in zip(metrics(run), damaged.metrics, strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)


def test_too_many_stop_all_ranks_at_the_same_step(damaged: Damaged, ranks: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = settings(damaged.damaged, most=2) + LAYOUTS["TP2"]
    ends = ranks.run(corrupt_worker.train, overrides, str(run), ranks=4, timeout_seconds=120)
    assert len(set(ends)) == 1
    assert "more than data.max_corrupt_samples=2" in ends[0]
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_without_a_limit_the_first_stops_the_run_and_is_named(
    damaged: Damaged, ranks: RankPool, tmp_path: Path
) -> None:
    overrides = settings(damaged.damaged, most=0)
    (end,) = ranks.run(corrupt_worker.train, overrides, str(tmp_path / "run"), ranks=1)
    assert any(key in end for key in damaged.keys)
