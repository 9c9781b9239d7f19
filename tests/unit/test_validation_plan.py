"""Validation before any model: which samples are held out, at which times, and who evaluates what."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import write_tiny_shards

from megatron_video.errors import UserError
from megatron_video.flow_matching import TimeDensity
from training.data_plan import PlannedBatch
from training.held_out import check_held_out
from training.validation import FixedTimes, ValidationBatch, deal_by_flops
from training.validation_config import ValidationConfig

COUNTS = {"1x32x32": 4}


def shards(folder: Path, source: str, seed: int = 0) -> str:
    return str(write_tiny_shards(folder / f"{source}{seed}", COUNTS, seed=seed, source=source))


def test_another_clip_of_a_training_video_is_no_held_out_sample(tmp_path: Path) -> None:
    """Keys are source-first-last: equal sources with other frames are refused too."""
    training = [shards(tmp_path, "a"), shards(tmp_path, "b")]
    other_clips, others = shards(tmp_path, "b", seed=1), shards(tmp_path, "c")
    record = tmp_path / "run" / "checked.json"
    with pytest.raises(UserError, match=r"1 of their source videos.*b1x32x32.*data split"):
        check_held_out(training, [others, other_clips], record)
    assert not record.exists()
    check_held_out(training, [others], record)
    assert record.exists()


def test_what_was_checked_is_checked_again_only_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, held_out, record = [shards(tmp_path, "a")], [shards(tmp_path, "c")], tmp_path / "checked.json"
    check_held_out(training, held_out, record)

    def refuse(*_: object) -> None:
        raise AssertionError("the indices were read again")

    with monkeypatch.context() as patched:
        patched.setattr("training.held_out._sources", refuse)
        check_held_out(training, held_out, record)
        os.utime(Path(held_out[0]) / "index.parquet", (1, 1))
        with pytest.raises(AssertionError, match="read again"):
            check_held_out(training, held_out, record)


def test_times_are_quantiles_of_the_density_or_even() -> None:
    density = TimeDensity(kind="logit_normal", mean=-1.0, shift=3.0)
    source = FixedTimes(0, 0.25, uniform=False)
    assert source.timestep(0, 3, density) == source.timestep(0, 4, density) == density.quantile(0.25)
    assert FixedTimes(0, 0.25, uniform=True).timestep(0, 3, density) == 0.25
    # The same noise at every time: differences between times are those of the model.
    assert source.noise(0, 3, (4,)).equal(FixedTimes(0, 0.75, uniform=False).noise(0, 3, (4,)))
    assert not source.noise(0, 3, (4,)).equal(FixedTimes(1, 0.25, uniform=False).noise(0, 3, (4,)))


@pytest.mark.parametrize("replicas", [1, 3, 4, 40])
def test_every_batch_is_dealt_once_and_replicas_cost_alike(replicas: int) -> None:
    costs = sorted([float(cost) for cost in np.random.default_rng(0).uniform(1, 10, 36)], reverse=True)
    planned = PlannedBatch("1x32x32", np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    batches = [ValidationBatch(0, number, planned, cost) for number, cost in enumerate(costs)]
    shares = deal_by_flops(batches, replicas)
    assert len(shares) == replicas
    assert sorted(batch.time for share in shares for batch in share) == list(range(36))
    loads = [sum(batch.flops for batch in share) for share in shares]
    # The greedy bound: nobody is above the mean by more than the dearest batch; here by far less.
    limit = 1.05 * sum(costs) / replicas if replicas <= 4 else max(costs)
    assert max(loads) <= limit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 5}, "every=5 needs shards"),
        ({"every": -1}, "every=-1"),
        ({"time_quantiles": 0}, "time_quantiles=0"),
        ({"samples_per_bucket": 0}, "samples_per_bucket=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)


def test_a_validation_is_due_every_so_many_steps_and_at_the_end() -> None:
    config = ValidationConfig(every=3, shards=["x"])
    assert [step for step in range(1, 9) if config.is_due(step, 8)] == [3, 6, 8]
    assert not any(ValidationConfig().is_due(step, 8) for step in range(1, 9))
