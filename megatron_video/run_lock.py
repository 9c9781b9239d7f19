"""One run at a time on an output: the second is refused, and told who holds it and what to do.

The operating system's lock on the file decides on one host, and goes with its process, also one that was killed. Many
network file systems keep such locks to each host, so the file also says who holds it: a holder on another host cannot
be looked at, and only a person can say that it is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_video.errors import FULL_DISK, UserError


@dataclass(frozen=True)
class Holder:
    """Who is writing."""

    pid: int
    host: str
    since: str
    """ISO 8601, UTC."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class LockedError(UserError):
    """Another run is writing there."""


@contextmanager
def run_lock(path: Path, output: str | Path) -> Iterator[None]:
    """Hold the lock file `path` while a run writes `output`; the file goes when it ends.

    Raises:
        LockedError: another run holds it; names the holder and the way out.
        UserError: nothing can be written there.
    """
    lock = _acquire(path, output)
    try:
        yield
    finally:
        # Before it is let go, or the next run's file would be removed.
        path.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def share_lock(path: Path, output: str | Path, share: str | None) -> Iterator[None]:
    """`run_lock` of an output, or of one share of it ("3-of-8"), which others may hold beside it.

    Raises:
        LockedError: another run holds the same share or the whole, or, for the whole, any share of it.
    """
    own = path if share is None else path.with_name(f"{path.name}.{share}")
    with run_lock(own, output):
        # Own lock first, then a look at the others: two that start at once may both be refused, but never both run.
        others = [path] if share else sorted(path.parent.glob(f"{path.name}.*-of-*"))
        for other in others:
            holder = holder_of(other)
            if holder:
                raise LockedError(_refusal(other, output, holder))
        yield


def holder_of(path: Path) -> Holder | None:
    """Who holds the lock file; None if nobody does, as after a process of this host was killed."""
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        locked = _try_flock(lock)
        holder = _read(lock)
        return None if locked and not _elsewhere(holder) else holder or _unknown()
    finally:
        os.close(lock)


def _acquire(path: Path, output: str | Path) -> int:
    while True:
        lock = _open(path, output)
        locked = _try_flock(lock)
        holder = _read(lock)
        if not locked or _elsewhere(holder):
            os.close(lock)
            raise LockedError(_refusal(path, output, holder or _unknown()))
        # The previous holder may have removed the file between our opening it and locking it.
        if _is_current(lock, path):
            break
        os.close(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(asdict(_self())).encode(), 0)
    return lock


def _open(path: Path, output: str | Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        # A file in place of a folder is told as "File exists".
        reason = "it is no folder" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
        raise UserError(f"--out {output}: {path.parent} cannot be written: {reason}; name another") from None


def _refusal(path: Path, output: str | Path, holder: Holder) -> str:
    if _elsewhere(holder):
        way_out = f"wait for it; if it no longer runs there, remove {path}"
    else:
        way_out = f"wait for it, or stop it (kill {holder.pid})" if holder.pid else "wait for it"
    return f"--out {output}: another run is writing there ({holder}); {way_out}"


def _self() -> Holder:
    return Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))


def _unknown() -> Holder:
    # LockedError, but not yet written: the holder is just starting.
    return Holder(0, socket.gethostname(), "a moment ago")


def _elsewhere(holder: Holder | None) -> bool:
    return holder is not None and holder.host != socket.gethostname()


def _try_flock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"the output's file system has no file locks: {error.strerror}; mount it with flock") from None
    return True


def _is_current(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _read(lock: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(lock, 4096, 0)))
    # Empty, or cut short by the death of who was writing it.
    except (ValueError, TypeError):
        return None
