"""Moves tensors one by one: one is read while the one before is written and those before that go to the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.journal import Journal
from checkpoints_tools.weights import digest
from megatron_video.errors import UserError
from megatron_video.files import sync

# What a kill may cost. Smaller steps would leave the disk idle between them.
_BYTES_BETWEEN_NOTES = 1 << 30


class Sink(Protocol):
    """Where tensors go: takes all of `names`, in that order."""

    @property
    def names(self) -> Sequence[str]:
        """All tensors, in the order in which they must come."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor."""

    def position(self) -> Any:
        """Where it stands, as JSON keeps it."""

    def go_on(self, position: Any) -> None:
        """Go on behind a `position` of an earlier process; raises ValueError if that is not there."""

    def paths(self) -> list[Path]:
        """The files so far."""

    def finish(self) -> None:
        """Write what belongs behind the tensors; everything is on the disk when this returns."""


def transfer(
    sink: Sink, tensor_of: Callable[[str], Tensor], journal: Journal | None = None, title: str = "write"
) -> dict[str, str]:
    """Write all tensors of a sink and finish it. At most two tensors are in memory.

    Args:
        sink: a new one.
        tensor_of: asked once for every tensor, in a thread of its own; not for those that the journal has already.
        journal: of a command that can be continued; None: of one that starts anew.
        title: of the progress bar.

    Returns:
        Name -> digest of every tensor that was written, now or before.

    Raises:
        OSError: naming the file that could not be written.
    """
    done = _resume(sink, journal)
    with tqdm(total=sink.bytes, desc=title, unit="B", unit_scale=True, disable=None) as bar, _Notes(journal) as notes:

        def read(name: str) -> tuple[Tensor, str]:
            tensor = tensor_of(name)
            return tensor, digest(tensor)

        for name, (tensor, found) in read_ahead(read, [name for name in sink.names if name not in done]):
            sink.write(name, tensor)
            done[name] = found
            bar.update(tensor.nbytes)
            notes.add(tensor.nbytes, done, sink)
            del tensor
    # From there it can be finished again.
    position = sink.position()
    sink.finish()
    if journal is not None:
        journal.note(done, position)
    return done


def read_ahead(read: Callable[[str], Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, read(name)) in order; the next one is read while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming: Future[Any] | None = None
        for index, name in enumerate(names):
            found = (coming or pool.submit(read, name)).result()
            following = names[index + 1 : index + 2]
            coming = pool.submit(read, following[0]) if following else None
            yield name, found
            # Not while the one behind it is waited for.
            del found


def verify_digests(read: Callable[[str], Tensor], digests: Mapping[str, str], files: Sequence[Path]) -> None:
    """Read tensors back, from the disk and not from memory, and compare them with what was written.

    Args:
        read: one tensor of the output.
        digests: name -> what it must be; of all tensors.
        files: those that hold them.

    Raises:
        UserError: naming those that differ.
    """
    for path in files:
        forget_pages(path)
    different = [
        name
        for name, found in tqdm(
            read_ahead(lambda name: digest(read(name)), list(digests)), total=len(digests), desc="verify", disable=None
        )
        if found != digests[name]
    ]
    if different:
        raise UserError(
            f"{files[0].parent} does not hold what was written: {', '.join(sorted(different)[:5])}; it was not kept"
        )


def forget_pages(path: Path) -> None:
    """Make the next reading of a file come from the disk."""
    sync(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _resume(sink: Sink, journal: Journal | None) -> dict[str, str]:
    if journal is None or journal.position is None:
        return {}
    try:
        sink.go_on(journal.position)
    except ValueError as error:
        raise UserError(f"{journal.folder} was changed since it was left ({error}); remove it") from None
    return dict(journal.done)


class _Notes:
    """Brings what was written to the disk and notes it in the journal, behind the writing's back."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="to-disk")
        self._running: Future[None] | None = None
        self._synced: dict[Path, int] = {}
        self._bytes = 0

    def __enter__(self) -> _Notes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None and self._running is not None:
            # The kernel tells an error of the disk once; a later fsync may not hear of it.
            self._running.result()

    def add(self, count: int, done: Mapping[str, str], sink: Sink) -> None:
        """So many bytes more were written; `done` are all tensors so far."""
        self._bytes += count
        if self._bytes < _BYTES_BETWEEN_NOTES:
            return
        self._bytes = 0
        # Also without a journal: pages that wait for the disk would fill the memory, and all be written at the end.
        if self._running is not None:
            self._running.result()
        self._running = self._pool.submit(self._note, dict(done), sink.position(), sink.paths())

    def _note(self, done: dict[str, str], position: Any, paths: list[Path]) -> None:
        for path in paths:
            size = path.stat().st_size
            if self._synced.get(path) != size:
                sync(path)
                self._synced[path] = size
        if self._journal is not None:
            self._journal.note(done, position)
