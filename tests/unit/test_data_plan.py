"""The order of the data: pure, complete, and the same for any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_video.errors import UserError
from training.config import DataConfig
from training.data_order import GroupOrder, Interleaving, KeyedPermutation, floor_sum
from training.data_plan import DataPlan
from training.sample_groups import WEIGHT_UNIT, GroupKey, Integers, ListedGroup, SampleGroup

VIDEO, IMAGE = "17x48x48", "1x48x48"
BUCKETS = {VIDEO: np.arange(0, 50), IMAGE: np.arange(50, 80)}
GROUPS: dict[GroupKey, SampleGroup] = {("a", name): ListedGroup(samples) for name, samples in BUCKETS.items()}
# A second source has other videos and no images.
TWO_SOURCES = {**GROUPS, ("b", VIDEO): ListedGroup(np.arange(80, 280))}


def make_plan(
    seed: int = 1,
    stage: str = "s",
    groups: dict[GroupKey, SampleGroup] = GROUPS,
    sources: dict[str, float] | None = None,
    **fields: object,
) -> DataPlan:
    values: dict = {"micro_batch_size": 4, "global_batch_size": 16, **fields}
    return DataPlan(groups, DataConfig(**values), seed, stage, sources)


def listing(plan: DataPlan, steps: range) -> list[tuple[int, int]]:
    return [(int(s), int(e)) for k in steps for b in plan.step(k) for s, e in zip(b.samples, b.epochs, strict=True)]


class Billions:
    """A group of two billion samples whose numbers are their places."""

    total_weight = None

    def __len__(self) -> int:
        return 2_000_000_000

    def __getitem__(self, places: Integers) -> Integers:
        return places

    def locate(self, units: Integers) -> Integers:
        raise ValueError("no weights")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 80), st.integers(0, 80))
def test_floor_sum_equals_the_plain_sum(count: int, modulus: int, step: int, offset: int) -> None:
    assert floor_sum(count, modulus, step, offset) == sum((step * i + offset) // modulus for i in range(count))


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
    counted = Counter(sequence.choices(0, index).tolist())
    assert sequence.counts_before(index) == [counted[i] for i in range(len(weights))]


def test_interleaving_is_even_and_any_part_of_it_the_same() -> None:
    sequence = Interleaving([5.0, 3.0, 0.01], "key")
    for index in (100, 1000, 10_000):
        expected = np.array([5.0, 3.0, 0.01]) / 8.01 * index
        assert np.abs(np.array(sequence.counts_before(index)) - expected).max() < 6
    far = 10**15
    assert (sequence.choices(far, 50)[20:] == sequence.choices(far + 20, 30)).all()


def test_every_epoch_draws_every_sample_of_a_bucket_once() -> None:
    drawn = Counter(listing(make_plan(), range(60)))
    assert max(drawn.values()) == 1
    last_epoch = max(epoch for _, epoch in drawn)
    for epoch in range(min(last_epoch, 5)):
        assert all((int(sample), epoch) in drawn for bucket in BUCKETS.values() for sample in bucket)


def test_epochs_are_in_different_order() -> None:
    plan = make_plan(groups={("a", VIDEO): GROUPS["a", VIDEO]}, micro_batch_size=50, global_batch_size=50)
    first, second = plan.step(0)[0].samples, plan.step(1)[0].samples
    assert sorted(first) == sorted(second)
    assert list(first) != list(second)


@pytest.mark.parametrize("fields", [{}, {"images_per_video": 0.7}])
def test_a_step_depends_on_nothing_before_it(fields: dict) -> None:
    whole = listing(make_plan(**fields), range(40))
    resumed = listing(make_plan(**fields), range(17, 40))
    assert whole[-len(resumed) :] == resumed
    assert len(whole) - len(resumed) == len(listing(make_plan(**fields), range(17)))


def test_seed_and_stage_change_the_order() -> None:
    plans = [make_plan(seed=1), make_plan(seed=2), make_plan(stage="other")]
    orders = [listing(plan, range(3)) for plan in plans]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_dealt_in_turn_ranks_share_the_same_global_batch(size: int) -> None:
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
    plan = make_plan(groups=TWO_SOURCES, images_per_video=1.3)
    for batch in (batch for step in range(30) for batch in plan.step(step)):
        members = {s for (_, bucket), group in TWO_SOURCES.items() if bucket == batch.bucket for s in _all(group)}
        assert set(batch.samples) <= members


def _all(group: SampleGroup) -> list[int]:
    return [int(sample) for sample in group[np.arange(len(group))]]


def test_shares_and_bucket_batch_sizes() -> None:
    plan = make_plan(bucket_weights={VIDEO: 3, IMAGE: 1}, bucket_micro_batch_sizes={IMAGE: 8})
    consumed = plan.consumed(500)
    assert consumed[IMAGE] / sum(consumed.values()) == pytest.approx(0.25, abs=0.01)
    assert sum(consumed.values()) / 500 == pytest.approx(plan.samples_per_step(), rel=0.01)
    assert plan.sample_shares() == pytest.approx({VIDEO: 0.75, IMAGE: 0.25})
    assert {len(batch.samples) for batch in plan.step(3) if batch.bucket == IMAGE} <= {8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bucket_weights": {VIDEO: 1.0}}, "no share for .'1x48x48'."),
        ({"bucket_weights": {VIDEO: 0.0, IMAGE: 0.0}}, "nothing to draw"),
        ({"bucket_weights": {VIDEO: 1.0, IMAGE: 1.0, "17x48x49": 1.0}}, "names .'17x48x49'."),
        ({"bucket_micro_batch_sizes": {"17x48x49": 1}}, "names .'17x48x49'."),
        ({"groups": {("a", VIDEO): GROUPS["a", VIDEO]}, "images_per_video": 1.0}, "needs buckets of videos and"),
    ],
)
def test_shares_of_other_buckets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(**fields)


def test_a_share_of_zero_leaves_a_bucket_out() -> None:
    assert make_plan(bucket_weights={VIDEO: 1, IMAGE: 0}).consumed(1000).get(IMAGE, 0) == 0


def test_without_shares_all_samples_are_drawn_equally_often() -> None:
    consumed = make_plan().consumed(1000)
    assert consumed[VIDEO] / 50 == pytest.approx(consumed[IMAGE] / 30, rel=0.02)


def test_images_on_top_come_in_their_ratio_and_every_one_in_turn() -> None:
    plan = make_plan(images_per_video=0.3)
    for step in (1, 10, 333):
        videos, images = plan.consumed(step)[VIDEO], plan.consumed(step)[IMAGE]
        assert videos == step * 16
        # A decimal fraction: 0.3 is not exact in binary.
        assert images == videos * 3 // 10
    drawn = Counter(sample for sample, _ in listing(plan, range(100)) if sample >= 50)
    assert max(drawn.values()) - min(drawn.values()) <= 1
    assert len(drawn) == 30
    assert plan.samples_per_step() == pytest.approx(16 * 1.3)
    assert plan.sample_shares()[IMAGE] == pytest.approx(0.3 / 1.3)


def test_sources_give_their_shares() -> None:
    plan = make_plan(groups=TWO_SOURCES, sources={"a": 0.75, "b": 0.25})
    drawn = Counter(sample >= 80 for sample, _ in listing(plan, range(500)))
    assert drawn[True] / 8000 == pytest.approx(0.25, abs=0.01)
    # Inside a source every sample is drawn equally often.
    of_a = Counter(sample < 50 for sample, _ in listing(plan, range(500)) if sample < 80)
    assert of_a[True] / 50 == pytest.approx(of_a[False] / 30, rel=0.05)


def test_every_source_is_drawn_in_epochs_of_its_own() -> None:
    drawn = Counter(listing(make_plan(groups=TWO_SOURCES, sources={"a": 0.75, "b": 0.25}), range(300)))
    assert max(drawn.values()) == 1
    for samples in (range(50), range(50, 80), range(80, 280)):
        epochs = {epoch for sample, epoch in drawn if sample in samples}
        # All but the last are complete.
        assert all((sample, epoch) in drawn for sample in samples for epoch in range(max(epochs)))


def test_sources_and_buckets_both_have_their_shares() -> None:
    plan = make_plan(groups=TWO_SOURCES, sources={"a": 0.6, "b": 0.4}, bucket_weights={VIDEO: 0.8, IMAGE: 0.2})
    drawn = [sample for sample, _ in listing(plan, range(500))]
    assert sum(sample >= 80 for sample in drawn) / 8000 == pytest.approx(0.4, abs=0.01)
    assert sum(50 <= sample < 80 for sample in drawn) / 8000 == pytest.approx(0.2, abs=0.01)


def test_shares_that_cannot_both_hold_are_refused() -> None:
    # All images are in source a, so that they cannot be half of all samples if it gives a third of them.
    with pytest.raises(UserError, match=r"cannot both hold.*'b': \['17x48x48'\]"):
        make_plan(groups=TWO_SOURCES, sources={"a": 1, "b": 2}, bucket_weights={VIDEO: 1, IMAGE: 1})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 7), min_size=2, max_size=40).filter(lambda weights: sum(weights) > 0.6), st.integers(0, 3))
def test_a_sample_of_weight_w_is_drawn_w_times_an_epoch(weights: list[float], epoch: int) -> None:
    order = GroupOrder(ListedGroup(np.arange(len(weights)), np.array(weights)), "key")
    size = order.draws_per_epoch
    assert size == pytest.approx(sum(weights), abs=0.51)
    samples, _ = order.take(np.arange(epoch * size, (epoch + 1) * size))
    counts = np.bincount(samples, minlength=len(weights))
    # Weights in whole numbers of draws: an epoch has round(sum) of them.
    scaled = np.array(weights) * size / sum(weights)
    assert (counts >= np.floor(scaled - 0.01)).all()
    assert (counts <= np.ceil(scaled + 0.01)).all()


def test_weights_hold_over_epochs_and_no_draw_has_the_number_of_another() -> None:
    weights = np.array([0.25, 0.5, 1.0, 1.75, 3.5])
    groups: dict[GroupKey, SampleGroup] = {("a", VIDEO): ListedGroup(np.arange(5), weights)}
    plan = make_plan(groups=groups, micro_batch_size=7, global_batch_size=7)
    drawn = listing(plan, range(400))
    assert len(set(drawn)) == len(drawn)
    counts = np.bincount([sample for sample, _ in drawn])
    assert counts / 400 == pytest.approx(weights, rel=0.1)
    assert GROUPS["a", VIDEO].total_weight is None
    assert ListedGroup(np.arange(5), weights).total_weight == 7 * WEIGHT_UNIT


def test_weighted_buckets_are_drawn_by_the_sum_of_their_weights() -> None:
    heavy = ListedGroup(BUCKETS[IMAGE], np.full(30, 5.0))
    consumed = make_plan(groups={**GROUPS, ("a", IMAGE): heavy}).consumed(1000)
    assert consumed[IMAGE] / 150 == pytest.approx(consumed[VIDEO] / 50, rel=0.02)


def test_two_billion_samples_late_in_the_run_cost_no_more() -> None:
    groups: dict[GroupKey, SampleGroup] = {("a", VIDEO): Billions(), ("a", IMAGE): Billions()}
    late = make_plan(groups=groups, images_per_video=1.0).step(10**9)
    assert sum(len(batch.samples) for batch in late) == 32
    assert max(int(batch.epochs.max()) for batch in late) == 8
