"""Child processes that are measured, and repetitions that take turns on a machine which others use too."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one child took, itself and its children."""

    wall_s: float
    cpu_s: float
    output: str


def run_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    output = process.stdout.read() if process.stdout else ""
    # wait4: the times of this child alone. (Its ru_maxrss would be that of this process, from before exec.)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.stdout:
        process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {output.strip().splitlines()[-1:] or process.returncode}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, output)


def python(*arguments: str) -> list[str]:
    """Command line of this Python."""
    return [sys.executable, *arguments]


def in_turns(ways: Mapping[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Figures of every repetition of every way; the order turns round, so that a busy spell hits all alike."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(repeats):
        names = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in names:
            found[name].append(ways[name]())
    return found


def medians(repetitions: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The median of each figure."""
    return {name: statistics.median(figures[name] for figures in repetitions) for name in repetitions[0]}


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
