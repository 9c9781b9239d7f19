"""The trace of allocations, against tensors whose sizes are known."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from training.planner.memory_trace import Section, trace_memory

CPU = torch.device("cpu")
FP32 = 4
# A mark allocates one number, for a moment.
MARK = FP32


def by_name(sections: list[Section]) -> dict[str, Section]:
    return {section.name: section for section in sections}


def test_sections_have_what_is_held_and_their_peaks() -> None:
    with trace_memory(CPU) as trace:
        trace.mark("one")
        first = torch.zeros(1000)
        trace.mark("two")
        second = torch.zeros(500) + torch.zeros(500)
        trace.mark("none")
        del first, second
        trace.mark("end")
    found = by_name(trace.sections)
    assert [section.name for section in trace.sections] == ["start", "one", "two", "none", "end"]
    assert (found["one"].start, found["one"].peak) == (0, 1000 * FP32)
    # Two operands and their sum.
    assert (found["two"].start, found["two"].peak) == (1000 * FP32, 2500 * FP32)
    assert (found["none"].start, found["none"].peak) == (1500 * FP32, 1500 * FP32 + MARK)
    assert found["end"].start == 0


def test_what_autograd_keeps_counts_until_backward() -> None:
    with trace_memory(CPU) as trace:
        weight = torch.ones(100, 100, requires_grad=True)
        x = torch.ones(50, 100, requires_grad=True)
        trace.mark("forward")
        # Nobody but autograd holds the product, which the sigmoid's gradient needs.
        out = (x @ weight).sigmoid().sum()
        trace.mark("backward")
        out.backward()
        del out
        trace.mark("end")
    found = by_name(trace.sections)
    operands, product, gradients = 100 * 100 + 50 * 100, 50 * 100, 100 * 100 + 50 * 100
    assert found["forward"].start == operands * FP32
    # In the sigmoid there are its input and its output.
    assert found["forward"].peak == (operands + 2 * product) * FP32
    assert found["backward"].start == (operands + product + 1) * FP32
    assert found["end"].start == (operands + gradients) * FP32


def test_another_threads_tensors_count() -> None:
    kept = [torch.zeros(10)]
    with trace_memory(CPU) as trace:
        kept.append(torch.zeros(2000))
        trace.mark("held")
        worker = threading.Thread(target=kept.clear)
        worker.start()
        worker.join()
        trace.mark("given up")
        worker = threading.Thread(target=lambda: kept.append(torch.zeros(3000)))
        worker.start()
        worker.join()
        trace.mark("made")
    found = by_name(trace.sections)
    assert found["held"].start - found["given up"].start in (2000 * FP32, 2010 * FP32)
    assert found["made"].start - found["given up"].start == 3000 * FP32


def test_traces_follow_one_another() -> None:
    for size in (100, 1000):
        gc.collect()
        with trace_memory(CPU) as trace:
            trace.mark("made")
            tensor = torch.zeros(size)
            trace.mark("end")
        assert by_name(trace.sections)["end"].start == tensor.numel() * FP32
        del tensor


def test_a_program_that_fails_fails_as_without_trace() -> None:
    trace = trace_memory(CPU)
    with pytest.raises(ZeroDivisionError), trace:
        torch.zeros(1 // 0)
    assert trace.sections == []
