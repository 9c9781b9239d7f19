"""The planner's memory beside the peaks of real training runs, rank by rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from training.local_ranks import RankPool
from training.planner.measure_memory import TOLERANCE_PERCENT, measure_layout
from training.planner.measured_layouts import LAYOUTS, MeasuredLayout
from training.planner.memory_trace import trace_memory

pytestmark = pytest.mark.distributed

NUMBERS, FP32 = 40_000, 4


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=() if layout.default else pytest.mark.heavy) for layout in LAYOUTS],
    ids=lambda layout: f"{layout.name} {layout.precision}",
)
def test_peaks_are_as_planned(layout: MeasuredLayout) -> None:
    compared = measure_layout(layout, "cpu")
    assert [found.rank for found in compared] == list(range(layout.ranks))
    residuals = [found.residual_percent for found in compared]
    assert residuals == pytest.approx([0.0] * layout.ranks, abs=TOLERANCE_PERCENT)


def test_messages_between_ranks_count_while_they_are_there(ranks: RankPool) -> None:
    for held, peak, after in ranks.run(exchange, ranks=2):
        assert held == NUMBERS * FP32
        # What is sent and what is received; gloo may copy either.
        assert 2 * NUMBERS * FP32 <= peak <= 4 * NUMBERS * FP32 + FP32
        assert after == 2 * NUMBERS * FP32


def exchange() -> tuple[int, int, int]:
    """Bytes held before an all-to-all, most of them in it, and after it."""
    with trace_memory(torch.device("cpu")) as trace:
        sent = torch.zeros(NUMBERS)
        trace.mark("exchange")
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        # Threads of gloo have given their work up when the next one is done.
        dist.barrier()
        trace.mark("after")
    _, exchange, after = trace.sections
    assert received.numel() == NUMBERS
    return exchange.start, exchange.peak, after.start
