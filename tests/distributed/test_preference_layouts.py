"""Video-DPO gives one process's numbers in every layout, whichever way its reference comes, and goes on exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from preference_worker import metrics, train
from tiny_pairs import write_tiny_pairs
from tiny_shards import write_tiny_shards

from training.events import read_events
from training.layout_matrix.table import LAYOUTS
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in LAYOUTS}
NAMES = ("dp2", "dp4_zero1_overlap", "dp2_fsdp", "tp2_sp", "pp2", "pp2_vpp2", "cp3_all_gather", "tp2_sp_pp2_cp2")
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
    ranks: RankPool, folder: Path, name: str, *overrides: str, parallel: dict[str, Any] | None = None, count: int = 1
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
    return ranks.run(train, [*run, *layout, *overrides], ranks=count)


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
