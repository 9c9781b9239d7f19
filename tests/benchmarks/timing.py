"""Times of a function on the device it runs on: CUDA events on a GPU, the clock elsewhere."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import torch

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}

Parts = Callable[[Callable[[], None]], None]
"""Does one repetition, and calls its argument between the parts that are timed apart."""


def part_seconds(run: Parts, device: torch.device, warmup: int, repeats: int, limit_s: float = math.inf) -> list[float]:
    """Median seconds of every part of `run`, which marks the ends of all parts but the last.

    After `limit_s` seconds three repetitions are enough.
    """
    clock = _cuda_repetition if device.type == "cuda" else _cpu_repetition
    for _ in range(warmup):
        clock(run)
    start = time.perf_counter()
    repetitions: list[list[float]] = []
    while len(repetitions) < repeats and (len(repetitions) < 3 or time.perf_counter() - start < limit_s):
        repetitions.append(clock(run))
    return [_median(list(times)) for times in zip(*repetitions, strict=True)]


def seconds(run: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> float:
    """Median seconds of `run`."""

    def one_part(_: Callable[[], None]) -> None:
        run()

    return part_seconds(one_part, device, warmup, repeats)[0]


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large square matrix product of random numbers: the ceiling for everything made of them."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, warmup=5, repeats=20) / 1e12


def _cuda_repetition(run: Parts) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    run(mark)
    mark()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]


def _cpu_repetition(run: Parts) -> list[float]:
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    run(mark)
    mark()
    return [second - first for first, second in itertools.pairwise(marks)]


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
