"""The matrix's table, its arithmetic and its printed form; the runs themselves are in tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_video.errors import UserError
from megatron_video.layout import Hardware
from megatron_video.layout_rules import broken_rule
from training.layout_matrix.checkpoints import CHECKPOINT_LAYOUTS, SHORT_READERS, SHORT_WRITERS, CrossLoad
from training.layout_matrix.checkpoints import cross_load_table as print_cells
from training.layout_matrix.command import main
from training.layout_matrix.compare import Errors, TensorError, assemble, compare
from training.layout_matrix.report import matrix_table, progress_line, summary
from training.layout_matrix.runner import Outcome
from training.layout_matrix.selection import layout_of, rows_for
from training.layout_matrix.table import LAYOUTS, Dtype, LayoutCase
from training.layout_matrix.worker import Piece, Report

QUANTITIES = ("gradients", "parameters", "main_parameters", "ema")


# Eight of them run every row.
H200 = Hardware(cuda=True, compute_capability=(9, 0), transformer_engine="2.11.0", cuda_version=(13, 0))


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_every_row_is_a_layout_that_the_rules_allow(case: LayoutCase) -> None:
    for dtype in case.dtypes:
        assert broken_rule(layout_of(case, dtype, H200)) is None
    assert case.ranks <= 8


def test_rows_with_transformer_engine_run_on_gpus_only() -> None:
    on_cpu, left_out = rows_for(Hardware(), ("float32", "bfloat16"))
    everything, nothing = rows_for(H200, ("float32", "bfloat16"))
    assert not nothing
    assert {case.name for case, _ in everything} - {case.name for case, _ in on_cpu} == set(left_out)
    assert all(name.startswith("te_") for name in left_out)
    assert ("te_cp4_p2p", "float32") not in {(case.name, dtype) for case, dtype in everything}
    one_gpu, _ = rows_for(H200, ("bfloat16",), max_ranks=1)
    assert {case.ranks for case, _ in one_gpu} == {1}


def test_names_are_told_apart_and_tables_name_rows_that_exist() -> None:
    names = [case.name for case in LAYOUTS]
    assert len(set(names)) == len(names)
    assert {*CHECKPOINT_LAYOUTS, *SHORT_WRITERS, *SHORT_READERS} <= {*names, "one_process"}


def test_token_counts_of_the_work_are_no_multiples_of_the_ranks() -> None:
    tokens = [frames * rows * columns for frames, rows, columns, _ in LAYOUTS[0].workload("float32").shapes]
    for ranks in (2, 3, 4, 8):
        assert any(count % ranks for count in tokens)
    frames = {shape[0] for shape in LAYOUTS[0].workload("float32").shapes}
    assert {1} < frames  # images beside videos


def piece(values: list[float], start: int = 0, shape: tuple[int, ...] = (4,), partition_dim: int = -1) -> Piece:
    return Piece(np.array(values, dtype=np.float32), start, shape, partition_dim)


def report(tensor_rank: int = 0, loss: float = 1.0, **tensors: Piece) -> Report:
    return Report(
        [loss], [2.0], {"loss t=0-0.1": loss}, tensor_rank, {quantity: dict(tensors) for quantity in QUANTITIES}
    )


def test_shards_and_tensor_parallel_cuts_are_put_together() -> None:
    whole = np.arange(8, dtype=np.float32).reshape(2, 4)
    cuts = [np.ascontiguousarray(cut).reshape(-1).tolist() for cut in np.split(whole, 2, axis=1)]
    reports = [
        report(rank, weight=piece(cut[start:stop], start, (2, 2), partition_dim=1))
        for rank, cut in enumerate(cuts)
        for start, stop in ((0, 3), (3, 4))
    ]
    found, differing = assemble(reports, "ema")
    np.testing.assert_array_equal(found["weight"], whole)
    assert not differing


def test_a_value_that_no_rank_holds_is_infinitely_wrong() -> None:
    errors = compare([report(weight=piece([1, 2]))], report(weight=piece([1, 2, 3, 4])))
    assert errors.parameters == TensorError(float("inf"), "weight")


def test_a_tensor_that_only_one_side_has_is_infinitely_wrong() -> None:
    both = {"weight": piece([1, 2, 3, 4])}
    for found, expected in (({}, {"bias": piece([0, 0, 0, 1])}), ({"bias": piece([0, 0, 0, 1])}, {})):
        errors = compare([report(**both, **found)], report(**both, **expected))
        assert errors.ema == TensorError(float("inf"), "bias")


@pytest.mark.parametrize("tensor_ranks", [(0, 0), (0, 1)], ids=["replicas", "tensor ranks"])
def test_copies_that_differ_by_the_last_bit_are_seen(tensor_ranks: tuple[int, int]) -> None:
    value = np.float32(1)
    reports = [
        report(rank, weight=piece([1, 1, 1, float(last)]))
        for rank, last in zip(tensor_ranks, (value, np.nextafter(value, np.float32(2))), strict=True)
    ]
    errors = compare(reports, report(weight=piece([1, 1, 1, 1])))
    assert errors.unequal_copies == tuple(f"{quantity} of weight" for quantity in QUANTITIES)


def test_errors_are_relative_to_each_tensor() -> None:
    found = {"large": piece([1000, 0, 0, 0.1]), "small": piece([0.001, 0, 0, 0.0001])}
    expected = {"large": piece([1000, 0, 0, 0]), "small": piece([0.001, 0, 0, 0])}
    errors = compare([report(loss=1.1, **found)], report(**expected))
    assert errors.gradients.name == "small"
    assert errors.gradients.error == pytest.approx(0.1)
    assert errors.loss == pytest.approx(0.1)
    assert errors.grad_norm == 0


def outcome(case: LayoutCase, dtype: Dtype, error: float = 1.2e-7) -> Outcome:
    tensor = TensorError(error, "time_conditioning.resolution_embedder.linear_2.weight")
    return Outcome(case, dtype, 123.4, Errors(error, error, tensor, tensor, tensor, tensor, tensor, ()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tables_fit_120_columns(dtype: Dtype) -> None:
    rows = [outcome(case, dtype) for case in LAYOUTS] + [Outcome(LAYOUTS[0], dtype, 1.0, None, "rank 0: broken")]
    lines = matrix_table(rows, dtype).splitlines()
    assert len(lines) == len(rows) + 3
    lines += [progress_line(row, index, len(rows), 37) for index, row in enumerate(rows)]
    assert max(map(len, lines)) <= 120
    cells = [
        CrossLoad(writer, reader, None, "broken") for writer in CHECKPOINT_LAYOUTS for reader in CHECKPOINT_LAYOUTS
    ]
    assert max(map(len, print_cells(cells).splitlines())) <= 120


def test_the_summary_names_what_is_wrong() -> None:
    text = summary([outcome(LAYOUTS[0], "float32"), outcome(LAYOUTS[1], "float32", 2e-5)])
    assert text.startswith("1 of 2 agree")
    assert f"{LAYOUTS[1].name} in fp32" in text
    assert "gradients: 2.0e-05 in time_conditioning.resolution_embedder.linear_2.weight, allowed 1e-05" in text
    failed = summary([Outcome(LAYOUTS[0], "float32", 1.0, None, "rank 2: Trace\nNo paper\nrank 0: Trace\nLost")])
    assert "No paper" in failed
    assert "Lost" not in failed


def test_a_name_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(UserError, match=r"--layouts tp9: not in the table; --list shows the names"):
        main(["--layouts", "tp2", "tp9"])
    with pytest.raises(UserError, match=r"--layouts tp9: not in the table"):
        main(["--checkpoints", "--layouts", "tp2", "tp9"])
    with pytest.raises(UserError, match="no layout is left with --max-ranks 1"):
        main(["--checkpoints", "--layouts", "tp2", "--max-ranks", "1"])
    with pytest.raises(UserError, match="--layouts tp2: needs more ranks than --max-ranks"):
        main(["--layouts", "tp2", "--max-ranks", "1"])
    with pytest.raises(UserError, match="no layout is left"):
        main(["--max-ranks", "0"])


def test_a_report_without_a_folder_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its folder does not exist"):
        main(["--report", str(tmp_path / "missing" / "a.md")])


def test_list_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--max-ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "tp2_sp" in shown
    assert "tp4_sp" not in shown
    larger = sum(case.ranks > 2 for case in LAYOUTS)
    assert f"left out: {larger} layouts of more than 2 ranks" in shown


def test_refusals_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--refusals", "--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.md")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    page = (tmp_path / "a.md").read_text()
    shown = capsys.readouterr().out
    for row in rows:
        assert row["rule"] in shown
        assert row["message"].split(":")[0] in page
    assert f"{len(rows)} kinds of layout are refused" in shown
