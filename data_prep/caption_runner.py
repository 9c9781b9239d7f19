"""Asking for all captions that are missing: frames decoded ahead, several requests under way, bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from data_prep.caption_config import Answer, CaptionConfig, Captioner, Clip, Kind, checked, load_clip
from data_prep.caption_journal import Journal
from data_prep.workers import Shard, batched, progress
from megatron_video.errors import UserError
from megatron_video.manifest import Row
from megatron_video.video_io import VideoError

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROWS_AT_ONCE = 4096


def ask_missing(
    table: pa.Table,
    captioner: Captioner,
    kinds: Sequence[Kind],
    config: CaptionConfig,
    journal: Journal,
    workers: int,
    max_failures: int,
    shard: Shard | None = None,
) -> None:
    """Put an answer for every kept row and kind, or a share's, into the journal.

    Raises:
        UserError: the source refuses us, or fails for `max_failures` clips in a row.
    """
    kept = table.filter(table["dropped_by"].is_null())
    if shard is not None:
        kept = kept.take([number for number in range(kept.num_rows) if number in shard])
    total = sum(bool(_open_kinds(clip_id, kinds, journal)) for clip_id in kept["clip_id"].to_pylist())
    todo = (row for row in _rows(kept) if _open_kinds(row["clip_id"], kinds, journal))
    guard = _Guard(max_failures)

    def ask(loaded: list[tuple[Row, Clip | VideoError]]) -> list[bool]:
        return _ask_batch(loaded, captioner, kinds, config, journal)

    decoders, askers = ThreadPoolExecutor(max(workers, 1)), ThreadPoolExecutor(captioner.concurrency)
    ahead = captioner.batch_size * (captioner.concurrency + 1) + workers
    try:
        clips = _windowed(decoders, lambda row: (row, load_clip(row, config, captioner.looks)), todo, ahead)
        answered = _windowed(askers, ask, batched(clips, captioner.batch_size), 2 * captioner.concurrency)
        for failed in progress((failed for batch in answered for failed in batch), total, "caption"):
            guard.note(failed, journal)
    except BaseException:
        # Its waits would otherwise hold the threads, and a Ctrl-C with them.
        captioner.close()
        raise
    finally:
        for pool in (askers, decoders):
            pool.shutdown(wait=True, cancel_futures=True)


class _Guard:
    """Stops a run whose source does not work at all, before it drops every clip."""

    def __init__(self, max_failures: int) -> None:
        self._most, self._row = max_failures, 0

    def note(self, failed: bool, journal: Journal) -> None:
        self._row = self._row + 1 if failed else 0
        if self._row >= self._most:
            # A copy: other threads still add to it.
            last = next(a.problem for a in reversed(list(journal.answers.values())) if a.problem)
            raise UserError(
                f"the source of captions failed for {self._row} clips in a row, the last time with: {last}; "
                "what was answered is kept, and the same command goes on from there (--max-failures)"
            )


def _ask_batch(
    loaded: Sequence[tuple[Row, Clip | VideoError]],
    captioner: Captioner,
    kinds: Sequence[Kind],
    config: CaptionConfig,
    journal: Journal,
) -> list[bool]:
    """For every clip, whether the source failed it."""
    failed = dict.fromkeys((row["clip_id"] for row, _ in loaded), False)
    for kind in kinds:
        clips = []
        for row, clip in loaded:
            if (row["clip_id"], kind) in journal.answers:
                continue
            if isinstance(clip, VideoError):
                journal.add(row["clip_id"], kind, Answer(problem=f"unreadable: {clip}"))
            else:
                clips.append(clip)
        answers = captioner.ask(kind, clips) if clips else []
        for clip, answer in zip(clips, answers, strict=True):
            answer = checked(answer, config)
            journal.add(clip.row["clip_id"], kind, answer)
            failed[clip.row["clip_id"]] |= answer.again or answer.problem.startswith("HTTP")
    return list(failed.values())


def _open_kinds(clip_id: str, kinds: Sequence[Kind], journal: Journal) -> list[Kind]:
    return [kind for kind in kinds if (clip_id, kind) not in journal.answers]


def _rows(table: pa.Table) -> Iterator[Row]:
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _windowed(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[Result]:
    """`function` over all items in a pool, in order, with at most `window` of them under way or waiting."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
