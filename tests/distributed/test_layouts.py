"""The layout matrix (training/layout_matrix): every layout trains to the numbers of one process, and a fault shows."""

from __future__ import annotations

import numpy as np
import pytest
from layout_faults import FAULTS, train_with_fault

from megatron_video.layout import Hardware
from training.layout_matrix.compare import assemble, compare, relative_error
from training.layout_matrix.report import summary
from training.layout_matrix.runner import ONE_PROCESS, References, run_case
from training.layout_matrix.selection import rows_for
from training.layout_matrix.table import LAYOUTS, TOLERANCES, Dtype, LayoutCase, Workload
from training.layout_matrix.worker import SETTINGS, train
from training.local_ranks import RankPool

pytestmark = pytest.mark.distributed
BY_NAME = {case.name: case for case in LAYOUTS}
# Seen where: the quantities that show it, of which none is the loss or the gradient norm in the first case.
FAULT_ROWS = {
    "norm not marked as sequence-parallel": ("tp2_sp", "gradients"),
    "key gradients not summed over context-parallel ranks": ("cp2_all_gather", "gradients"),
    "embedders cut differently on every stage": ("pp4_dp2_zero1", "unequal copies"),
    "replicas train on the same data": ("dp2", "loss"),
    "EMA not updated": ("dp2_zero1", "ema"),
}


ROWS, _ = rows_for(Hardware(), ("float32", "bfloat16"))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{dtype}-{case.name}", marks=() if case.is_short(dtype) else (pytest.mark.heavy,))
        for case, dtype in ROWS
    ],
)
def test_layout_gives_the_numbers_of_one_process(
    case: LayoutCase, dtype: Dtype, ranks: RankPool, references: References
) -> None:
    outcome = run_case(ranks, references, case, dtype)
    assert not outcome.wrong, summary([outcome])


@pytest.mark.parametrize("name", ["pp2", "pp2_vpp2"])
def test_embedder_gradients_of_all_stages_add_up_to_those_of_one(
    name: str, ranks: RankPool, references: References
) -> None:
    """Every stage has the embedders of time and text, and each sees only its own layers' part of the gradient."""
    workload = Workload()
    reports = ranks.run(train, BY_NAME[name], workload, ranks=2)
    expected, _ = assemble([references.report(workload)], "gradients")
    embedders = [tensor for tensor in expected if tensor.startswith(("time_conditioning.", "text_projection."))]
    assert len(embedders) == 24
    for report in reports:
        held, _ = assemble([report], "gradients")
        assert set(embedders) <= set(held)
        for tensor in embedders:
            assert relative_error(held[tensor], expected[tensor]) < 1e-5, tensor
            # The sum is over all stages: a single stage's part is another tensor.
            assert held[tensor].any()


def test_the_work_moves_all_that_is_compared(references: References) -> None:
    """Comparisons would also hold if nothing were trained, clipped or averaged."""
    report = references.report(Workload())
    assert len(set(report.losses)) == len(report.losses)
    assert min(report.grad_norms) > SETTINGS.clip_grad_norm
    gradients, parameters, averages = (assemble([report], name)[0] for name in ("gradients", "parameters", "ema"))
    assert gradients.keys() == parameters.keys() == averages.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert relative_error(averages[name], parameters[name]) > 10 * TOLERANCES["float32"].ema, name


def test_dropout_and_visible_text_change_the_numbers(references: References) -> None:
    """Rows with dropout and with text masks would agree with each other if neither had an effect."""
    plain = references.report(Workload())
    for other in (Workload(hidden_dropout=0.2), Workload(all_text_visible=True)):
        assert not np.allclose(references.report(other).losses, plain.losses, rtol=1e-4)


def test_bf16_on_one_process_is_farther_from_fp32_than_layouts_may_be(references: References) -> None:
    """The bf16 limits are below the error of bf16 itself."""
    errors = compare([references.report(Workload(dtype="bfloat16"))], references.report(Workload()))
    assert "unequal copies" not in errors.above(TOLERANCES["bfloat16"])
    for quantity in ("loss", "grad_norm", "gradients", "parameters", "main_parameters", "ema"):
        assert errors.value(quantity) > getattr(TOLERANCES["bfloat16"], quantity), quantity


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, ranks: RankPool, references: References) -> None:
    name, quantity = FAULT_ROWS[fault]
    case, workload = BY_NAME[name], Workload()
    reports = ranks.run(train_with_fault, case, workload, fault, ranks=case.ranks)
    assert quantity in compare(reports, references.report(workload)).above(TOLERANCES["float32"])


def test_measuring_the_layers_changes_nothing_and_covers_all_of_them(references: References) -> None:
    """Every part of the model has a size; the parts' gradients together have the norm that clipping uses."""
    report = references.report(Workload())
    layers = [f"layers.{number}" for number in range(Workload().num_layers)]
    ends = ["time_conditioning", "text_projection", "head"]
    for kind, parts in (("activation_rms", ["patch_embedding", *layers]), ("grad_norm", [*layers, *ends])):
        assert all(report.telemetry[f"{kind} {part}"] > 0 for part in parts)
    norms = [value for name, value in report.telemetry.items() if name.startswith("grad_norm ")]
    assert np.linalg.norm(norms) == pytest.approx(report.grad_norms[-1], rel=1e-6)
    weights = assemble([report], "parameters")[0]
    # Measured before the last update, which moves a norm by less than this.
    found = np.linalg.norm([value for name, value in report.telemetry.items() if name.startswith("param_norm ")])
    assert found == pytest.approx(np.sqrt(sum(np.square(weight).sum() for weight in weights.values())), rel=1e-2)


def test_one_process_repeats_itself_bit_for_bit(ranks: RankPool, references: References) -> None:
    again = ranks.run(train, ONE_PROCESS, Workload(), ranks=1)[0]
    first = references.report(Workload())
    assert (again.losses, again.grad_norms) == (first.losses, first.grad_norms)
    errors = compare([again], first)
    assert errors.gradients.error == errors.parameters.error == errors.ema.error == 0
