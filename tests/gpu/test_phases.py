"""Times of a step's parts by CUDA events: right, and without waiting for the device."""

from __future__ import annotations

import time

import pytest
import torch
from gpu_runs import needs_cuda

from training.phases import Phases

pytestmark = [pytest.mark.gpu, needs_cuda]


def test_device_phases_are_timed_on_the_device_and_nothing_waits_for_it() -> None:
    phases = Phases(torch.device("cuda"))
    phases.times_device = True
    begin = time.perf_counter()
    for step in range(3):
        phases.enter("data", step)
        phases.enter("forward_backward")
        torch.cuda._sleep(200_000_000)
        phases.enter("reduce")
        phases.enter("agree")
        phases.enter("update")
        phases.enter("report")
    on_host = time.perf_counter() - begin
    before = phases.take_seconds()["forward_backward"]
    torch.cuda.synchronize()
    in_all = time.perf_counter() - begin
    seconds = before + phases.take_seconds()["forward_backward"]
    assert on_host < 0.5 * in_all
    assert 0.8 * in_all < seconds < in_all
