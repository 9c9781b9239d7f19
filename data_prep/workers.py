"""Work over many items: several processes, results in order, progress on stderr."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from megatron_video.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOG_EVERY_SECONDS = 10.0


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` in order. With one worker everything runs in this process.

    Workers are spawned, not forked: libav, OpenCV and Arrow keep threads that do not survive a fork.
    """
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    if workers == 1 or len(items) < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    # Several items a message where there are many, but every worker gets some.
    chunk = max(1, min(16, len(items) // (4 * workers)))
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_quiet_worker) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunk)
        finally:
            # On Ctrl-C what is queued is not worth waiting for.
            pool.shutdown(wait=False, cancel_futures=True)


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
