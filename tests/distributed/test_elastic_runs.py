"""One run continued on other numbers of replicas trains on the samples, and to the numbers, of an undisturbed one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import elastic_worker
import pytest
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards

from training.local_ranks import RankPool

# Replicas of every life, and the step at which it ends: three restarts.
LIVES = ((1, 3), (4, 6), (2, 9), (3, 12))
STEPS = LIVES[-1][1]
SETTINGS = [
    *MODEL_OVERRIDES,
    "run.seed=5",
    "data.micro_batch_size=1",
    "data.draw_size=2",
    "data.global_batch_size=8",
    "data.images_per_video=1.25",
    "data.bucket_micro_batch_sizes=auto",
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "optimizer.learning_rate=1e-3",
    "optimizer.eps=1e-4",
    "optimizer.warmup_steps=1",
    "ema.decay=0.9",
    "training.precision=fp32",
]

Line = tuple[int, str, int, str]
"""(step, key, epoch, digest)"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shards(tmp_path_factory.mktemp("elastic"))


def run(ranks: RankPool, shards: Path, folder: Path, replicas: int, steps: int, *overrides: str) -> None:
    folder.mkdir(exist_ok=True)
    fields = [f"data.shards=[{shards}]", f"run.output_dir={folder}", f"training.steps={steps}"]
    codes = ranks.run(elastic_worker.train, [*SETTINGS, *fields, *overrides], steps, ranks=replicas)
    assert set(codes) == {0}


def consumed(folder: Path) -> list[Line]:
    lines = [json.loads(line) for path in folder.glob("consumed_*.jsonl") for line in path.read_text().splitlines()]
    return [(line["step"], line["key"], line["epoch"], line["digest"]) for line in lines]


def curve(folder: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm)."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


@pytest.fixture(scope="module")
def undisturbed(ranks: RankPool, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(ranks, shards, folder, 1, STEPS)
    return folder


@pytest.fixture(scope="module")
def elastic(ranks: RankPool, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic_run")
    for replicas, end in LIVES:
        run(ranks, shards, folder, replicas, end)
    return folder


def test_every_sample_is_that_of_the_undisturbed_run(undisturbed: Path, elastic: Path) -> None:
    expected, found = consumed(undisturbed), consumed(elastic)
    assert Counter(found) == Counter(expected)
    # The restarts are real: every life has its replicas' files, and each of them had something to do.
    files = sorted(path.name for path in elastic.glob("consumed_*.jsonl"))
    assert len(files) == sum(replicas for replicas, _ in LIVES)
    assert all((elastic / name).stat().st_size for name in files)


def test_nothing_is_repeated_or_dropped(elastic: Path) -> None:
    """By itself: every sample's epochs follow one another, and no two draws have the same noise."""
    lines = consumed(elastic)
    assert {step for step, *_ in lines} == set(range(STEPS))
    assert len({digest for *_, digest in lines}) == len(lines)
    epochs: dict[str, list[int]] = {}
    for _, key, epoch, _ in sorted(lines):
        epochs.setdefault(key, []).append(epoch)
    assert all(sorted(found) == list(range(len(found))) for found in epochs.values())
    assert max(len(found) for found in epochs.values()) >= 2
    assert len(epochs) == 41


def test_loss_and_gradient_norm_are_those_of_the_undisturbed_run(undisturbed: Path, elastic: Path) -> None:
    expected, found = curve(undisturbed), curve(elastic)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, numbers in expected.items():
        assert found[step] == pytest.approx(numbers, rel=1e-5), step
    # Other steps have other numbers: equality says something.
    assert len({round(loss, 4) for loss, _ in expected.values()}) == STEPS


@pytest.mark.parametrize("replicas", [2, 4])
def test_dealt_in_turn_or_by_other_costs_it_trains_to_the_same(
    ranks: RankPool, shards: Path, tmp_path: Path, replicas: int
) -> None:
    """`data.balance` and `data.cost_profile` decide where a sample is trained on, never which."""
    (tmp_path / "profile.yaml").write_text("17x48x48: 1.0\n17x48x64: 0.2\n1x48x48: {1: 0.5, 4: 0.6}\n")
    plain = ["data.images_per_video=null", "data.bucket_micro_batch_sizes={}"]
    ways = {
        "flops": [],
        "in turn": ["data.balance=none"],
        "seconds": [f"data.cost_profile={tmp_path / 'profile.yaml'}"],
    }
    curves, lines = {}, {}
    for name, overrides in ways.items():
        run(ranks, shards, tmp_path / name, replicas, 2, *plain, *overrides)
        curves[name], lines[name] = curve(tmp_path / name), consumed(tmp_path / name)
    for name in ways:
        assert Counter(lines[name]) == Counter(lines["flops"])
        for step, numbers in curves["flops"].items():
            assert curves[name][step] == pytest.approx(numbers, rel=1e-5)
