"""Sharing a step out to replicas: greedy by cost, complete, and as even as images allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_video.config_io import load_config
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from training.balance import PlannedBatch, cut_evenly, deal_by_cost, fill_up, loads_in_turn
from training.balance_cost import Costs, coarse_sizes, read_profile
from training.config import PRESET_DIR, DataConfig, PretrainConfig
from training.data_plan import BatchSizes, DataPlan
from training.run_plan import automatic_sizes, dealing_costs
from training.sample_groups import GroupKey, ListedGroup, SampleGroup
from training.simulate_balance import flops_of, made_up_seconds, main, mix_of, run_scenario, scenarios

LONG, SHORT, IMAGE = "34x48x48", "17x48x48", "1x48x48"
COSTS = Costs.of_flops({LONG: 100.0, SHORT: 40.0, IMAGE: 3.0})
SIZES = {LONG: 1, SHORT: 2, IMAGE: 8}
GROUPS: dict[GroupKey, SampleGroup] = {
    ("a", name): ListedGroup(np.arange(first, first + 200)) for name, first in ((LONG, 0), (SHORT, 200), (IMAGE, 400))
}
PAPER = DiTConfig()


def make_plan(costs: Costs | None = COSTS, sizes: BatchSizes | None = None, **fields: object) -> DataPlan:
    values: dict = {
        "micro_batch_size": 1,
        "global_batch_size": 24,
        "images_per_video": 1.5,
        "bucket_micro_batch_sizes": SIZES,
        **fields,
    }
    return DataPlan(GROUPS, DataConfig(**values), 3, "s", sizes=sizes, costs=costs)


def drawn(batches: list[PlannedBatch]) -> list[tuple[str, int, int]]:
    return sorted((b.bucket, int(s), int(e)) for b in batches for s, e in zip(b.samples, b.epochs, strict=True))


def one_by_one(loads: list[float], count: int, cost: float) -> list[int]:
    """What `fill_up` must give: every item to the replica with the least load."""
    now, counts = list(loads), [0] * len(loads)
    for _ in range(count):
        least = now.index(min(now))
        now[least] += cost
        counts[least] += 1
    return counts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_filling_up_is_greedy(loads: list[int], count: int, cost: int, large: bool) -> None:
    scale = 1e15 if large else 1.0
    found = fill_up(np.array(loads) * scale, count, cost * scale)
    assert found.tolist() == one_by_one([float(load) for load in loads], count, float(cost))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.integers(0, 500), st.floats(1e-3, 50))
def test_filling_up_gives_out_all_and_evenly(loads: list[float], count: int, cost: float) -> None:
    counts = fill_up(np.array(loads), count, cost)
    assert counts.sum() == count
    assert (counts >= 0).all()
    after = np.array(loads) + counts * cost
    # Nobody who was given something is above another by more than the last thing given.
    if count:
        assert (after - cost)[counts > 0].max() <= after.min() + 1e-6 * max(1.0, after.max())


@pytest.mark.parametrize("fields", [{}, {"images_per_video": None}, {"draw_size": 3}])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 24])
def test_any_number_of_replicas_has_the_same_samples(size: int, fields: dict) -> None:
    plan = make_plan(**fields)
    for step in (0, 1, 50):
        shares = [plan.rank_share(step, rank, size) for rank in range(size)]
        assert drawn([batch for share in shares for batch in share]) == drawn(plan.step(step))
        assert all(shares)
        for batch in (batch for share in shares for batch in share):
            assert 1 <= len(batch.samples) <= SIZES[batch.bucket]
        loads = [sum(COSTS.of(b.bucket, len(b.samples)) for b in share) for share in shares]
        dealing = plan.dealing(step, size)
        assert dealing.loads == pytest.approx(loads)
        assert dealing.loads_by(COSTS) == pytest.approx(loads)
        assert dealing.micro_batches.tolist() == [len(share) for share in shares]


def test_loads_differ_by_an_image_where_there_are_enough() -> None:
    plan = make_plan(images_per_video=10.0)
    for step in range(5):
        loads = plan.dealing(step, 5).loads
        assert loads.max() - loads.min() <= COSTS.sample[IMAGE]


def test_the_order_does_not_depend_on_how_it_is_dealt() -> None:
    seconds = Costs("s", {LONG: 1.0, SHORT: 5.0, IMAGE: 0.1}, {LONG: 0.1, SHORT: 0.0, IMAGE: 0.3})
    plans = [make_plan(costs) for costs in (COSTS, seconds, None)]
    for step in range(5):
        assert drawn(plans[0].step(step)) == drawn(plans[1].step(step)) == drawn(plans[2].step(step))
    assert plans[0].identity() == plans[1].identity() == plans[2].identity()
    assert drawn(plans[0].rank_share(0, 0, 3)) != drawn(plans[1].rank_share(0, 0, 3))


def test_last_digits_of_costs_decide_nothing() -> None:
    """Every replica shares out for itself, maybe on processors that round otherwise."""
    exact = {LONG: 0.3, SHORT: 0.1, IMAGE: 0.01}
    batches = [
        batch
        for name, count in ((LONG, 1), (SHORT, 3), (IMAGE, 1))
        for batch in cut_evenly(name, np.arange(count), np.arange(count), 1)
    ]
    random = np.random.default_rng(0)
    found = set()
    for _ in range(20):
        shaken = Costs.of_flops({name: cost * (1 + 1e-15 * random.standard_normal()) for name, cost in exact.items()})
        # A long video is as much as three short ones: who gets the image is decided by the last digits.
        found.add(tuple(batch.bucket for batch in deal_by_cost(batches, 2, shaken, dict.fromkeys(exact, 1)).share(0)))
    assert len(found) == 1


def test_overheads_of_micro_batches_count() -> None:
    costs = Costs("s", {LONG: 1.0, SHORT: 0.1, IMAGE: 0.01}, {LONG: 0.0, SHORT: 10.0, IMAGE: 1.0})
    plan = make_plan(costs)
    # The most expensive first: by overhead that is SHORT. Two replicas have as many of them but for one.
    first, second = (plan.rank_share(0, rank, 2) for rank in range(2))
    counts = [sum(batch.bucket == SHORT for batch in share) for share in (first, second)]
    assert abs(counts[0] - counts[1]) <= 1
    loads = [sum(costs.of(b.bucket, len(b.samples)) for b in share) for share in (first, second)]
    assert plan.dealing(0, 2).loads == pytest.approx(loads)


def test_a_video_is_last_and_images_are_between() -> None:
    for rank in range(3):
        buckets = [batch.bucket for batch in make_plan().rank_share(2, rank, 3)]
        assert buckets[0] != IMAGE != buckets[-1]
        assert IMAGE in buckets


def test_whole_draws_stay_together() -> None:
    sizes = BatchSizes({LONG: 2, SHORT: 5, IMAGE: 8}, {LONG: 1, SHORT: 2, IMAGE: 8}, whole_draws=True)
    plan = make_plan(sizes=sizes, draw_size=3, bucket_micro_batch_sizes={})
    pieces = {b.draw: [c for c in plan.step(1) if c.draw == b.draw] for b in plan.step(1) if b.draw >= 0}
    assert len(pieces) == 8
    assert {len(cut) for cut in pieces.values()} == {2, 3}
    for rank in range(3):
        share = plan.rank_share(1, rank, 3)
        for draw in {batch.draw for batch in share if batch.bucket != IMAGE}:
            assert drawn([b for b in share if b.draw == draw]) == drawn(pieces[draw])


def test_more_replicas_than_items_are_refused() -> None:
    batches = cut_evenly(SHORT, np.arange(4), np.zeros(4, dtype=np.int64), 2)
    assert deal_by_cost(batches, 2, COSTS, SIZES).micro_batches.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"3 replicas.*2 micro-batches.*global_batch_size"):
        deal_by_cost(batches, 3, COSTS, SIZES)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100), st.integers(1, 40))
def test_micro_batches_are_cut_evenly(count: int, most: int) -> None:
    cut = cut_evenly(IMAGE, np.arange(count), np.arange(count), most)
    sizes = [len(batch.samples) for batch in cut]
    assert [sample for batch in cut for sample in batch.samples] == list(range(count))
    assert len(sizes) == -(-count // most)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_dealt_in_turn_loads_are_summed() -> None:
    batches = [b for name in (LONG, SHORT, LONG) for b in cut_evenly(name, np.arange(1), np.arange(1), 1)]
    assert loads_in_turn(batches, 2, COSTS).tolist() == [200.0, 40.0]


def test_equation_12_gives_the_sizes_of_the_paper() -> None:
    """F_target = 4 x (204 x 256 x 256) and alpha = 1, from the FLOPs of Table 3."""
    flops = {"a": 1717.20, "b": 1592.61, "c": 1079.85, "d": 1004.89, "e": 509.31, "f": 475.87, "g": 44.99}
    # With the shares in which a draw has more than four samples on average, alpha would be more; here only g counts.
    sizes, alpha = coarse_sizes(flops, {"a": 1.0}, 4)
    assert alpha == 1
    assert sizes == {"a": 4, "b": 4, "c": 6, "d": 6, "e": 13, "f": 14, "g": 152}


@pytest.mark.parametrize("mean", [2, 3, 4, 8])
@pytest.mark.parametrize("mix", [(1, 1, 1), (6, 3, 1), (2, 3, 5), (1, 2, 7)])
def test_alpha_is_for_equal_cost_and_the_mean_size(mean: int, mix: tuple[int, int, int]) -> None:
    # Tokens of 544 x 992 pixels.
    flops = {f"{n}x544x992": float(training_flops(48, 6144, 2108 * 3 * n // 17)) for n in (68, 136, 204)}
    shares = dict(zip(flops, mix, strict=True))
    sizes, alpha = coarse_sizes(flops, shares, mean)
    assert alpha >= 1
    assert all(sizes[name] == max(1, int(mean * max(flops.values()) / alpha / flops[name] + 1e-9)) for name in flops)
    found = sum(mix) / sum(share / sizes[name] for name, share in shares.items())
    assert 0.65 < found / mean < 1.5
    mean_cost = found * sum(share * flops[name] for name, share in shares.items()) / sum(mix)
    assert max(sizes[name] * flops[name] for name in flops) / mean_cost < 1.07


def test_automatic_micro_batches_are_bounded_by_the_longest_sample() -> None:
    buckets = ["1x544x992", "68x544x992", "204x544x992"]
    data = DataConfig(micro_batch_size=1, draw_size=2, global_batch_size=2)
    sizes, _ = automatic_sizes(PAPER, buckets, dict.fromkeys(buckets[1:], 1.0), data)
    # 2,108, 25,296 and 75,888 tokens.
    assert sizes.micro_batch == {"1x544x992": 36, "68x544x992": 3, "204x544x992": 1}
    assert sizes.draw["204x544x992"] == 1
    assert sizes.draw["68x544x992"] > 3


@pytest.mark.parametrize(
    ("text", "samples", "micro_batch"),
    [
        ("17x48x48: 0.5\n1x48x48: 0.1", 0.5, 0.0),
        ("17x48x48: {4: 2.0}\n1x48x48: 0.1", 0.5, 0.0),
        ("17x48x48: {2: 1.5, 4: 2.5, 8: 4.5}\n1x48x48: 0.1", 0.5, 0.5),
        # A line that would start below 0.
        ("17x48x48: {1: 0.4, 2: 1.2}\n1x48x48: 0.1", 0.5, 0.0),
        ('{"17x48x48": {"2": 1.5, "4": 2.5}, "1x48x48": 0.1}', 0.5, 0.5),
    ],
)
def test_profiles_are_read(tmp_path: Path, text: str, samples: float, micro_batch: float) -> None:
    path = tmp_path / ("profile.json" if text.startswith("{") else "profile.yaml")
    path.write_text(text)
    costs = read_profile(path, [SHORT, IMAGE])
    assert costs.unit == "s"
    assert (costs.sample[SHORT], costs.micro_batch[SHORT]) == pytest.approx((samples, micro_batch))
    assert costs.sample[IMAGE] == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("17x48x48: 0.5", "no seconds for .'1x48x48'."),
        ("17x48x48: -1\n1x48x48: 1", "17x48x48: -1 must be seconds"),
        ("17x48x48: {}\n1x48x48: 1", "must be seconds"),
        ("17x48x48: fast\n1x48x48: 1", "must be seconds"),
        ("- 1", "must map buckets to seconds"),
        ("{", "cannot be read"),
    ],
)
def test_bad_profiles_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"data\.cost_profile=.*{message}"):
        read_profile(path, [SHORT, IMAGE])
    with pytest.raises(UserError, match="cannot be read"):
        read_profile(tmp_path / "none.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "unit"),
    [
        ([], "FLOP"),
        (["data.cost_profile={profile}"], "s"),
        (["data.balance=none"], None),
        (["parallel.use_megatron_fsdp=true"], None),
        (["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"], None),
    ],
)
def test_by_what_a_run_balances(tmp_path: Path, overrides: list[str], unit: str | None) -> None:
    (tmp_path / "p.yaml").write_text("17x48x48: 1")
    fields = [text.format(profile=tmp_path / "p.yaml") for text in overrides]
    costs = dealing_costs(load_config(PretrainConfig, None, fields), {SHORT: 1.0})
    assert (costs.unit if costs else None) == unit


@pytest.mark.parametrize("preset", ["step_video_30b_t2vi_192_s1", "step_video_30b_t2vi_540_s1"])
def test_presets_of_the_paper_are_even_on_375_replicas(preset: str) -> None:
    """The acceptance of the balance: max / mean of cost at most 1.03, and far more without it."""
    config = load_config(PretrainConfig, preset, [], PRESET_DIR)
    buckets = list(config.data.buckets or [])
    shares = mix_of([name for name in buckets if not name.startswith("1x")], None)
    flops = flops_of(config, buckets)
    found = {}
    for scenario in scenarios(config.data.global_batch_size // 375)[:3]:
        for images in (1.0, 1.9):
            outcome = run_scenario(config, scenario, 375, 2, images, shares, (flops, flops))
            found[scenario.name, images] = outcome.worst_step
    names = list(dict.fromkeys(name for name, _ in found))
    for images, limit in ((1.0, 1.03), (1.9, 1.015)):
        in_turn, coarse, fine = (found[name, images] for name in names)
        assert fine <= limit < coarse < 1.1 < 2 < in_turn


@pytest.mark.parametrize("lengths", [(6, 3, 1), (5, 3, 2), (2, 3, 5), (1, 2, 7)])
def test_other_mixes_of_lengths_are_even_too(lengths: tuple[int, int, int]) -> None:
    config = load_config(PretrainConfig, "step_video_30b_t2vi_540_s1", [], PRESET_DIR)
    videos = [name for name in config.data.buckets or [] if not name.startswith("1x")]
    weights = dict(zip(("68", "136", "204"), lengths, strict=True))
    equal = mix_of(videos, None)
    shares = mix_of(videos, {name: equal[name] * weights[name.split("x")[0]] for name in videos})
    flops = flops_of(config, list(config.data.buckets or []))
    fine = scenarios(2)[2]
    assert run_scenario(config, fine, 375, 2, 1.9, shares, (flops, flops)).worst_step < 1.03


def test_seconds_even_out_what_flops_do_not_know() -> None:
    config = load_config(PretrainConfig, "step_video_30b_t2vi_192_s1", [], PRESET_DIR)
    buckets = list(config.data.buckets or [])
    shares = mix_of([name for name in buckets if not name.startswith("1x")], None)
    flops = flops_of(config, buckets)
    costs = (flops, made_up_seconds(flops, 0.1))
    _, _, by_flops, by_seconds = scenarios(4, with_seconds=True)[:4]
    found = [run_scenario(config, way, 375, 2, 1.9, shares, costs).max_over_mean for way in (by_flops, by_seconds)]
    assert found[1] < 1.03 < 1.06 < found[0]


def test_simulation_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "step_video_30b_t2vi_540_s3", "--replicas", "20", "--steps", "2", "--out", str(tmp_path)])
    assert "| t2vi_540_s3 |" in capsys.readouterr().out
    assert (tmp_path / "balance_simulation.json").stat().st_size > 1000
    assert (tmp_path / "balance_simulation.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="holds no videos"):
        main(["--config", "step_video_30b_t2i_256_s1", "--out", str(tmp_path)])
