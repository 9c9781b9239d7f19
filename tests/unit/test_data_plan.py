"""The order of the data: pure, complete, and the same for any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_video.errors import UserError
from training.config import DataConfig
from training.data_plan import DataPlan, Interleaving, KeyedPermutation, _floor_sum

BUCKETS = {"video": np.arange(0, 50), "image": np.arange(50, 80)}


def make_plan(seed: int = 1, stage: str = "s", **fields: object) -> DataPlan:
    values: dict = {"micro_batch_size": 4, "global_batch_size": 16, **fields}
    return DataPlan(BUCKETS, DataConfig(**values), seed, stage)


def listing(plan: DataPlan, steps: range) -> list[tuple[int, int]]:
    return [(int(s), int(e)) for k in steps for b in plan.step(k) for s, e in zip(b.samples, b.epochs, strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 80), st.integers(0, 80))
def test_floor_sum_equals_the_plain_sum(count: int, modulus: int, step: int, offset: int) -> None:
    assert _floor_sum(count, modulus, step, offset) == sum((step * i + offset) // modulus for i in range(count))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_keyed_permutation_is_a_permutation(size: int) -> None:
    image = KeyedPermutation(size, "key")(np.arange(size))
    assert sorted(image) == list(range(size))


def test_keyed_permutations_of_other_keys_are_unrelated() -> None:
    size = 2000
    one, two = (KeyedPermutation(size, key)(np.arange(size)) for key in ("a", "b"))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.1
    assert (one == two).sum() < 10


def test_keyed_permutation_of_billions_costs_no_memory() -> None:
    permutation = KeyedPermutation(2_000_000_000, "key")
    places = np.array([0, 1, 1_999_999_999])
    assert len(set(permutation(places))) == 3
    assert permutation(places).max() < 2_000_000_000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 400))
def test_interleaving_counts_equal_counting(weights: list[float], index: int) -> None:
    sequence = Interleaving(weights, "key")
    counted = Counter(sequence.choice(i) for i in range(index))
    assert sequence.counts_before(index) == [counted[i] for i in range(len(weights))]


def test_interleaving_is_even() -> None:
    sequence = Interleaving([5.0, 3.0, 0.01], "key")
    for index in (100, 1000, 10_000):
        expected = np.array([5.0, 3.0, 0.01]) / 8.01 * index
        assert np.abs(np.array(sequence.counts_before(index)) - expected).max() < 6


def test_every_epoch_draws_every_sample_of_a_bucket_once() -> None:
    drawn = Counter(listing(make_plan(), range(60)))
    assert max(drawn.values()) == 1
    last_epoch = max(epoch for _, epoch in drawn)
    for epoch in range(min(last_epoch, 5)):
        assert all((int(sample), epoch) in drawn for bucket in BUCKETS.values() for sample in bucket)


def test_epochs_are_in_different_order() -> None:
    plan = DataPlan({"video": BUCKETS["video"]}, DataConfig(micro_batch_size=50, global_batch_size=50), 0, "s")
    first, second = plan.step(0)[0].samples, plan.step(1)[0].samples
    assert sorted(first) == sorted(second)
    assert list(first) != list(second)


def test_a_step_depends_on_nothing_before_it() -> None:
    whole = listing(make_plan(), range(40))
    resumed = listing(make_plan(), range(17, 40))
    assert whole[17 * 16 :] == resumed


def test_seed_and_stage_change_the_order() -> None:
    plans = [make_plan(seed=1), make_plan(seed=2), make_plan(stage="other")]
    orders = [listing(plan, range(3)) for plan in plans]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(size: int) -> None:
    plan = make_plan()
    for step in range(20):
        shares = [plan.rank_share(step, rank, size) for rank in range(size)]
        dealt = [shares[i % size][i // size] for i in range(4)]
        for ours, whole in zip(dealt, plan.step(step), strict=True):
            assert ours.bucket == whole.bucket
            assert (ours.samples == whole.samples).all()


def test_draw_size_keeps_the_order_when_the_micro_batch_changes() -> None:
    small, large = (make_plan(micro_batch_size=size, draw_size=8) for size in (2, 8))
    assert listing(small, range(30)) == listing(large, range(30))


def test_micro_batches_have_one_bucket() -> None:
    plan = make_plan()
    for batch in (batch for step in range(30) for batch in plan.step(step)):
        assert set(batch.samples) <= set(BUCKETS[batch.bucket])


def test_shares_and_bucket_batch_sizes() -> None:
    plan = make_plan(bucket_weights={"video": 3, "image": 1}, bucket_micro_batch_sizes={"image": 8})
    consumed = plan.consumed(500)
    assert consumed["image"] / sum(consumed.values()) == pytest.approx(0.25, abs=0.01)
    assert sum(consumed.values()) / 500 == pytest.approx(plan.samples_per_step(), rel=0.01)
    assert {len(batch.samples) for batch in plan.step(3) if batch.bucket == "image"} <= {8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bucket_weights": {"video": 1.0}}, "no share for .'image'."),
        ({"bucket_weights": {"video": 0.0, "image": 0.0}}, "nothing to draw"),
        ({"bucket_weights": {"video": 1.0, "image": 1.0, "vidoe": 1.0}}, "names .'vidoe'."),
        ({"bucket_micro_batch_sizes": {"vidoe": 1}}, "names .'vidoe'."),
    ],
)
def test_shares_of_other_buckets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(**fields)


def test_a_share_of_zero_leaves_a_bucket_out() -> None:
    assert make_plan(bucket_weights={"video": 1, "image": 0}).consumed(1000)["image"] == 0


def test_without_shares_all_samples_are_drawn_equally_often() -> None:
    consumed = make_plan().consumed(1000)
    assert consumed["video"] / 50 == pytest.approx(consumed["image"] / 30, rel=0.02)
