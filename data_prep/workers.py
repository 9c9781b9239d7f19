"""Work over many items: several processes or Ray, results in order, in bounded memory; progress on stderr."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from tqdm import tqdm

from megatron_video.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

Engine = Literal["local", "ray"]

_LOG_EVERY_SECONDS = 10.0
# Messages under way per process: enough that none waits, few enough that memory stays bounded.
_AHEAD = 4


@dataclass(frozen=True)
class Shard:
    """The part of a stage's work that one task of an array does."""

    index: int
    """From 0, as SLURM_ARRAY_TASK_ID of `--array=0-N` counts."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"--shard {self}: I/N needs 0 <= I < N, such as 0/8 to 7/8")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            UserError: it is something else.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise UserError(f"--shard {text!r} is not of the form I/N, such as 0/8")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def __contains__(self, number: int) -> bool:
        # Neighbours are alike (one folder, one kind of file), so every N-th balances better than N stretches.
        return number % self.count == self.index


@dataclass(frozen=True)
class Execution:
    """How the work of a row stage is spread; the result does not depend on it."""

    workers: int = 1
    """Processes; with Ray, tasks at once."""
    engine: Engine = "local"
    shard: Shard | None = None
    """Do only this part; whoever finds all parts there joins them."""


def as_execution(workers: int | Execution) -> Execution:
    """A plain number means that many local processes."""
    return workers if isinstance(workers, Execution) else Execution(workers)


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | Execution
) -> Iterator[Result]:
    """Yield `function(item)` in order. With one local worker everything runs in this process.

    Workers are spawned, not forked: libav, OpenCV and Arrow keep threads that do not survive a fork.

    Raises:
        UserError: a worker was killed, or Ray is asked for and not installed.
    """
    execution = as_execution(workers)
    if execution.workers < 1:
        raise UserError(f"--workers {execution.workers} must be at least 1")
    if execution.engine == "ray":
        # Imported only where it is wanted: Ray is an extra.
        from data_prep.ray_engine import ray_map

        yield from ray_map(function, items, execution.workers)
    elif execution.workers == 1 or len(items) < 2:
        yield from map(function, items)
    else:
        yield from _process_map(function, items, min(execution.workers, len(items)))


def _process_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    # Several items a message where there are many, but every worker gets some.
    size = max(1, min(16, len(items) // (4 * workers)))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
        try:
            running: deque[Future[list[Result]]] = deque()
            for chunk in batched(items, size):
                running.append(pool.submit(_map_chunk, function, chunk))
                if len(running) >= _AHEAD * workers:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed from outside, most often for want of memory; the same command goes on "
                f"where it was (--workers {workers}: fewer need less memory)"
            ) from None
        finally:
            # On Ctrl-C what is queued is not worth waiting for.
            pool.shutdown(wait=False, cancel_futures=True)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _map_chunk(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def progress(items: Iterable[Item], total: int, title: str, unit: str = "clip") -> Iterator[Item]:
    """Pass `items` through: a bar on a terminal, a plain line every ten seconds and at the end elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, unit=unit, file=sys.stderr)
        return
    started = reported = time.monotonic()
    count = 0
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - reported > _LOG_EVERY_SECONDS:
            reported = time.monotonic()
            print(f"{title}: {count}/{total} {unit}s", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    print(f"{title}: {count}/{total} {unit}s in {seconds:.1f} s", file=sys.stderr, flush=True)


def _quiet_worker() -> None:
    # Ctrl-C goes to the whole process group; only the parent should speak. Libraries must not add threads per worker.
    import signal

    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
