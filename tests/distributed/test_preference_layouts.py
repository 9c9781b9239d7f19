"""Video-DPO gives one process's numbers in every layout, whichever way its reference comes, and goes on exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_worker import (
    metrics,
    train,
    train_beside_a_resident_reference,
    train_where_others_see_no_errors,
)
from tiny_pairs import write_tiny_pairs
from tiny_shards import write_tiny_shards

from training.events import read_events
from training.layout_matrix.table import LAYOUTS
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in LAYOUTS}
# All layouts of the matrix that change neither the model, nor its kernels, nor the form of the batches.
NAMES = [
    case.name
    for case in LAYOUTS
    if not (case.changes or case.pack_positions or case.single_samples) and case.config.transformer_impl == "local"
]
SHORT = ("dp2_fsdp", "pp2_vpp2", "tp2_sp_pp2_cp2")
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """Pairs, and the run that alignment starts from."""
    root = tmp_path_factory.mktemp("preference")
    write_tiny_shards(root / "shards", learnable=True)
    write_tiny_pairs(root / "pairs")
    base = ["training.steps=3", f"data.shards=[{root / 'shards'}]", f"run.output_dir={root / 'base'}"]
    assert ranks.run(train, base, ranks=1) == [None]
    return root


def aligned(
    ranks: RankPool,
    folder: Path,
    name: str,
    *overrides: str,
    parallel: dict[str, Any] | None = None,
    count: int = 1,
    how: Callable[[list[str]], str | None] = train,
) -> list[str | None]:
    """Align in a layout; refusals by rank."""
    run = [
        "run.stage=dpo",
        "dpo.beta=40",
        f"data.shards=[{folder / 'pairs'}]",
        f"run.initial_weights={folder / 'base'}",
        f"run.output_dir={folder / name}",
        f"training.steps={STEPS}",
    ]
    layout = [f"parallel.{field}={json.dumps(value)}" for field, value in (parallel or {}).items()]
    return ranks.run(how, [*run, *layout, *overrides], ranks=count)


@pytest.fixture(scope="module")
def single(ranks: RankPool, folder: Path) -> list[dict[str, Any]]:
    assert aligned(ranks, folder, "single") == [None]
    return metrics(folder / "single")


def test_it_starts_at_the_reference_and_learns(single: list[dict[str, Any]]) -> None:
    first, last = single[0], single[-1]
    # Policy and reference are one: bit for bit the same errors, from a pass of their own and from the step.
    assert (first["reward_margin"], first["winner_change"], first["loser_change"]) == (0, 0, 0)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["grad_norm"] > 0.01
    assert last["reward_margin"] > 0
    assert len(single) == STEPS


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else (pytest.mark.heavy,)) for n in NAMES])
def test_numbers_of_one_process(name: str, ranks: RankPool, folder: Path, single: list[dict[str, Any]]) -> None:
    case = BY_NAME[name]
    assert aligned(ranks, folder, name, parallel=case.parallel, count=case.ranks) == [None] * case.ranks
    for ours, theirs in zip(metrics(folder / name), single, strict=True):
        # A margin is a difference of errors, times half of beta: it has their digits, not its own.
        assert ours == {key: pytest.approx(value, rel=1e-5, abs=2e-5) for key, value in theirs.items()}


def test_a_swapped_reference_gives_the_same_numbers(
    ranks: RankPool, folder: Path, single: list[dict[str, Any]]
) -> None:
    assert aligned(ranks, folder, "swapped", "dpo.reference=swapped") == [None]
    assert metrics(folder / "swapped") == single


def test_both_give_the_numbers_of_a_second_model(ranks: RankPool, folder: Path, single: list[dict[str, Any]]) -> None:
    assert aligned(ranks, folder, "resident", how=train_beside_a_resident_reference) == [None]
    resident = metrics(folder / "resident")
    assert resident[-1]["loser_change"] != 0
    # Precomputed; the swapped one is compared with it above.
    assert single == resident


def test_one_rank_reads_the_errors(ranks: RankPool, folder: Path, single: list[dict[str, Any]]) -> None:
    assert aligned(ranks, folder, "unseen", count=2, how=train_where_others_see_no_errors) == [None] * 2
    for ours, theirs in zip(metrics(folder / "unseen"), single, strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-5, abs=2e-5) for key, value in theirs.items()}


def test_data_that_is_left_out_moves_up_later_data_but_not_beta(ranks: RankPool, folder: Path) -> None:
    options = ["faults.skip_data_steps=[[2,4]]", "dpo.final_beta=400"]
    for way in ("precomputed", "swapped"):
        assert aligned(ranks, folder, f"left_out_{way}", f"dpo.reference={way}", *options) == [None]
    found = metrics(folder / "left_out_precomputed")
    assert found == metrics(folder / "left_out_swapped")
    check_betas(found, [40, 112, 184, 256, 328, 400])


def check_betas(steps: list[dict[str, Any]], betas: list[float]) -> None:
    """By the definition of the margin; nothing can be said of the first step, where it is zero."""
    for step, beta in zip(steps, betas, strict=True):
        change = step["winner_change"] - step["loser_change"]
        assert step["reward_margin"] == pytest.approx(-beta / 2 * change, rel=1e-4, abs=1e-6 * beta)


# Losses of one pair from its margin, the winner's error and beta: written anew, for one label in four that is wrong.
LOSSES: dict[str, tuple[list[str], Callable[[float, float, float], float]]] = {
    "dpo": ([], lambda margin, winner, beta: softplus(-margin)),
    "smoothed": (
        ["dpo.label_smoothing=0.25"],
        lambda margin, winner, beta: 0.75 * softplus(-margin) + 0.25 * softplus(margin),
    ),
    "rdpo": (
        ["dpo.loss=rdpo", "dpo.label_smoothing=0.25"],
        lambda margin, winner, beta: 1.5 * softplus(-margin) - 0.5 * softplus(margin),
    ),
    "ipo": (["dpo.loss=ipo"], lambda margin, winner, beta: (margin / beta - 1 / (2 * beta)) ** 2),
    "regularised": (["dpo.sft_weight=0.3"], lambda margin, winner, beta: softplus(-margin) + 0.3 * winner),
    "schedule": (["dpo.final_beta=100"], lambda margin, winner, beta: softplus(-margin)),
}


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_logged_is_the_formula_of_the_logged_errors(name: str, ranks: RankPool, folder: Path) -> None:
    options, formula = LOSSES[name]
    # One pair a step: the mean of a loss is not the loss of means.
    one = ["data.global_batch_size=1", "data.draw_size=1", "training.steps=4"]
    assert aligned(ranks, folder, f"loss_{name}", *one, *options) == [None]
    found = metrics(folder / f"loss_{name}")
    for step, beta in zip(found, [40, 60, 80, 100] if name == "schedule" else [40] * 4, strict=True):
        margin = -beta / 2 * (step["winner_change"] - step["loser_change"])
        assert step["reward_margin"] == pytest.approx(margin, rel=1e-4, abs=1e-6)
        assert step["loss"] == pytest.approx(formula(margin, step["winner_error"], beta), rel=1e-4)
    assert found[-1]["reward_margin"] != 0


def test_a_schedule_goes_on_where_it_was(ranks: RankPool, folder: Path) -> None:
    options = ["dpo.final_beta=400", "training.save_every=2", "training.keep_checkpoints=0"]
    aligned(ranks, folder, "schedule", *options)
    whole = metrics(folder / "schedule")
    for step in (4, 6):
        shutil.rmtree(folder / "schedule" / "checkpoints" / f"step_{step:08d}")
    assert aligned(ranks, folder, "schedule", *options) == [None]
    # Both lives have left their lines.
    assert metrics(folder / "schedule")[6:] == whole[2:]
    check_betas(whole, [40, 112, 184, 256, 328, 400])


@pytest.mark.parametrize("name", ["dp4_zero1_overlap", "pp2_vpp2"])
def test_a_swapped_reference_in_other_layouts(
    name: str, ranks: RankPool, folder: Path, single: list[dict[str, Any]]
) -> None:
    case = BY_NAME[name]
    aligned(ranks, folder, f"{name}_swapped", "dpo.reference=swapped", parallel=case.parallel, count=case.ranks)
    found = metrics(folder / f"{name}_swapped")
    for ours, theirs in zip(found, single, strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-5, abs=2e-5) for key, value in theirs.items()}


def drifts(run_dir: Path) -> list[float]:
    return [event["drift"]["loss"] for event in read_events(run_dir, "validation")]


def test_drift_is_told_and_leaves_the_weights_alone(
    ranks: RankPool, folder: Path, single: list[dict[str, Any]]
) -> None:
    held_out = write_tiny_shards(folder / "held_out", {"17x48x48": 4, "1x48x48": 2}, seed=5, source="other")
    validation = [f"validation.shards=[{held_out}]", "validation.every=2", "validation.time_quantiles=3"]
    aligned(ranks, folder, "drift", *validation)
    # What comes back after the reference was in place is what was there, bit for bit.
    assert metrics(folder / "drift") == single
    found = drifts(folder / "drift")
    assert len(found) == 3
    assert 0 < found[0] < found[-1]
    layouts = [("drift_swapped", "dpo.reference=swapped", "dp2_zero1"), ("drift_pp", "dpo.beta=40", "pp2_vpp2")]
    for name, option, layout in layouts:
        case = BY_NAME[layout]
        aligned(ranks, folder, name, *validation, option, parallel=case.parallel, count=case.ranks)
        assert drifts(folder / name) == pytest.approx(found, rel=1e-3)


def test_a_run_that_is_stopped_goes_on_exactly_and_also_longer(
    ranks: RankPool, folder: Path, single: list[dict[str, Any]]
) -> None:
    # The errors of the later steps are computed when the run is prolonged, with the reference and not the policy.
    aligned(ranks, folder, "stopped", "training.steps=3")
    assert aligned(ranks, folder, "stopped", count=2, parallel={"tensor_model_parallel_size": 2}) == [None, None]
    for ours, theirs in zip(metrics(folder / "stopped"), single, strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-5, abs=2e-5) for key, value in theirs.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dpo.beta=50", "dpo.beta: 40.0 there, 50.0 here"),
        ("dpo.label_smoothing=0.1", "dpo.label_smoothing: 0.0 there, 0.1 here"),
        ("run.seed=4", "scheme: megatron-video-plan-2/3/dpo there, megatron-video-plan-2/4/dpo here"),
    ],
)
def test_it_is_not_continued_with_another_objective(
    change: str, said: str, ranks: RankPool, folder: Path, single: list[dict[str, Any]]
) -> None:
    (refusal,) = aligned(ranks, folder, "single", change, "training.steps=9")
    assert refusal is not None
    assert said in refusal


def test_errors_of_another_reference_or_seed_are_refused(ranks: RankPool, folder: Path) -> None:
    other = folder / "other_errors"
    aligned(ranks, folder, "other_errors", "training.steps=2")
    for checkpoint in (other / "checkpoints").glob("step_*"):
        checkpoint.rename(folder / f"moved_{checkpoint.name}")
    (refusal,) = aligned(ranks, folder, "other_errors", "run.seed=9")
    assert refusal is not None
    assert "computed for something else" in refusal
    assert "seed: 3 there, 9 here" in refusal
    weights = folder / "single" / "checkpoints" / f"step_{STEPS:08d}"
    (refusal,) = aligned(ranks, folder, "other_errors", f"dpo.reference_weights={weights}")
    assert refusal is not None
    assert "reference: step_00000003" in refusal


def test_samples_and_pairs_are_not_taken_for_each_other(ranks: RankPool, folder: Path) -> None:
    (refusal,) = aligned(ranks, folder, "samples", f"data.shards=[{folder / 'shards'}]")
    assert refusal is not None
    assert "holds single samples, not preference pairs" in refusal
    (refusal,) = ranks.run(
        train, [f"data.shards=[{folder / 'pairs'}]", f"run.output_dir={folder / 'wrong'}", "training.steps=2"], ranks=1
    )
    assert "holds preference pairs" in refusal


def test_equal_members_leave_the_weights_alone(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    write_tiny_pairs(tmp_path / "equal", {"17x48x48": 8}, equal=True)
    assert aligned(ranks, folder, "equal", f"data.shards=[{tmp_path / 'equal'}]", "training.steps=2") == [None]
    for step in metrics(folder / "equal"):
        assert step["reward_margin"] == 0
        assert step["grad_norm"] < 1e-4
