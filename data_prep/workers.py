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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from threading import Thread
from typing import Literal, TypeVar

from tqdm import tqdm

from megatron_video.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

Engine = Literal["local", "ray"]

_LOG_EVERY_SECONDS = 10.0
# Messages under way per process: enough that none waits, few enough that memory stays bounded.
_AHEAD = 4
# Of an item alone in a process, after its process was killed: another item, or the kernel, may have been to blame.
_ATTEMPTS = 2


@dataclass(frozen=True)
class Shard:
    """The part of a stage's work that one task of an array does."""

    index: int
    """From 0, as SLURM_ARRAY_TASK_ID of `--array=0-N` counts."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"--shard {self}: I/N needs 0 <= I < N, such as 0/8 to 7/8")

    @property
    def lock_name(self) -> str:
        """For run_lock.share_lock."""
        return f"{self.index}-of-{self.count}"

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
    in_process: bool = False
    """Work in the calling process: starts at once, but a clip that crashes its decoder takes the stage with it."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers {self.workers} must be at least 1")


def as_execution(workers: int | Execution) -> Execution:
    """A plain number means that many local processes; 1 is the calling process itself."""
    return workers if isinstance(workers, Execution) else Execution(workers, in_process=workers == 1)


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | Execution,
    lost: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """Yield `function(item)` in order.

    Workers are spawned, not forked: libav, OpenCV and Arrow keep threads that do not survive a fork. When one is
    killed, what was under way is done again, one item at a time; an item that kills its process again gives
    `lost(item)`.

    Raises:
        UserError: an item killed its process twice and there is no `lost`, or Ray is asked for and not installed.
    """
    execution = as_execution(workers)
    if execution.engine == "ray":
        # Imported only where it is wanted: Ray is an extra.
        from data_prep.ray_engine import ray_map

        yield from ray_map(function, items, execution.workers, lost)
    elif execution.in_process:
        yield from map(function, items)
    elif len(items):
        yield from _process_map(function, items, min(execution.workers, len(items)), lost)


def _process_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, lost: Callable[[Item], Result] | None
) -> Iterator[Result]:
    # Several items a message where there are many, but every worker gets some.
    chunks = batched(items, max(1, min(16, len(items) // (4 * workers))))
    under_way: deque[list[Item]] = deque()
    while True:
        try:
            yield from _through_pool(function, chunks, workers, under_way)
            return
        except BrokenProcessPool:
            suspects = [item for chunk in under_way for item in chunk]
            under_way.clear()
        reason = "a worker process was killed, most often for want of memory"
        print(f"{reason}; doing {len(suspects)} items again, one at a time", file=sys.stderr, flush=True)
        yield from _one_at_a_time(function, suspects, lost)


def _through_pool(
    function: Callable[[Item], Result], chunks: Iterator[list[Item]], workers: int, under_way: deque[list[Item]]
) -> Iterator[Result]:
    """Results in order; `under_way` holds the chunks that were taken and gave none yet."""
    with _pool(workers) as pool:
        running: deque[Future[list[Result]]] = deque()
        for chunk in chunks:
            under_way.append(chunk)
            running.append(pool.submit(_map_chunk, function, chunk))
            if len(running) >= _AHEAD * workers:
                yield from _first(running, under_way)
        while running:
            yield from _first(running, under_way)


def _first(running: deque[Future[list[Result]]], under_way: deque[list[Item]]) -> list[Result]:
    results = running.popleft().result()
    under_way.popleft()
    return results


def _one_at_a_time(
    function: Callable[[Item], Result], items: Sequence[Item], lost: Callable[[Item], Result] | None
) -> Iterator[Result]:
    for item in items:
        for _ in range(_ATTEMPTS):
            with _pool(1) as pool:
                try:
                    result = pool.submit(function, item).result()
                    break
                except BrokenProcessPool:
                    continue
        else:
            if lost is None:
                raise UserError(f"{item} killed {_ATTEMPTS + 1} worker processes; take it out of the input")
            result = lost(item)
        yield result


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes that end with this block, and with this process if that is killed."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
    try:
        yield pool
    except BaseException:
        # After Ctrl-C nobody wants to wait until the film that a process has in hand is through.
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


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
            left = (reported - started) / count * (total - count) / 60
            print(f"{title}: {count}/{total} {unit}s, about {left:.0f} min left", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    print(f"{title}: {count}/{total} {unit}s in {seconds:.1f} s", file=sys.stderr, flush=True)


def _start_worker() -> None:
    import signal

    import cv2

    # Ctrl-C goes to the whole process group; only the parent should speak. Libraries must not add threads per worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent cannot say so, and an idle worker would wait for its next message for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
