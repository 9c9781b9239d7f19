"""Many encoding processes on one folder: one a GPU, or several on CPUs, each taking whole shards.

The parent hands out shards and encodes nothing. When a worker dies (a kill, a crash inside a decoder) its shard, and
no other, is given to a fresh one. A shard on which workers keep dying is gone through clip by clip: the clip whose
decoding kills is dropped, and where no clip is to blame the run stops with the exit code.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from data_prep.clip_encoder import Suspicion
from data_prep.disk import disk_errors
from data_prep.encode_plan import PlannedShard
from data_prep.encode_shard import EncodeJob, write_shard
from megatron_video.errors import UserError

# Deaths on one shard before its clips are looked at one by one, and after that without a clip to blame.
MAX_DEATHS = 2
# Clips of one shard that may be dropped as deadly; more have another cause.
MAX_DEADLY_CLIPS = 8
_STOP_SECONDS = 10.0


@dataclass
class _Task:
    """A shard and what happened to those who tried it."""

    shard: PlannedShard
    deaths: int = 0
    blameless_deaths: int = 0
    """Deaths under suspicion while no clip was being decoded."""
    strikes: Counter[str] = field(default_factory=Counter)
    """Deaths under suspicion while that clip was being decoded."""
    decoding: str | None = None
    done: int = 0
    """Clips reported, in the attempt that got farthest."""

    @property
    def suspected(self) -> bool:
        return self.deaths >= MAX_DEATHS

    @property
    def deadly(self) -> frozenset[str]:
        # Twice: once may be somebody else's kill at a bad moment.
        return frozenset(clip for clip, deaths in self.strikes.items() if deaths >= MAX_DEATHS)

    def died(self) -> None:
        """Note a death on this shard, and what may be to blame."""
        if not self.suspected:
            self.deaths += 1
        elif self.decoding is not None:
            self.strikes[self.decoding] += 1
        else:
            self.blameless_deaths += 1

    @property
    def hopeless(self) -> bool:
        return self.blameless_deaths >= MAX_DEATHS or len(self.strikes) > MAX_DEADLY_CLIPS


class _Worker:
    """A process, the parent's end of its pipe, and what it is doing."""

    def __init__(self, job: EncodeJob) -> None:
        context = multiprocessing.get_context("spawn")
        self.job = job
        self.task: _Task | None = None
        self.ready = False
        self.failure = ""
        self.connection, theirs = context.Pipe()
        # Spawned, not forked: CUDA and libav do not survive a fork.
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self.process.start()
        # The parent's copy of their end must go, or the end of the process would not be the end of the pipe.
        theirs.close()

    def give(self, task: _Task) -> None:
        self.task = task
        task.decoding = None
        # One that died just now is noticed at the other end of the wait.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((task.shard, task.suspected, task.deadly))

    def cause(self) -> str:
        self.process.join(_STOP_SECONDS)
        return self.failure or f"exit code {self.process.exitcode}"


@dataclass
class Fleet:
    """Runs shards on workers, one on each of `devices`; counts what was lost on the way."""

    job: EncodeJob
    devices: Sequence[str]
    deaths: int = 0
    idle_deaths: int = 0
    redone: list[str] = field(default_factory=list)
    """Names of shards that were begun again."""

    def run(self, shards: Sequence[PlannedShard]) -> Iterator[int]:
        """Encode all shards; yields at every clip that is done.

        Raises:
            UserError: a worker reports bad input or a full disk, or workers keep dying.
        """
        waiting = deque(_Task(shard) for shard in shards)
        workers = [_Worker(self.job.on(device)) for device in self.devices[: max(1, len(waiting))]]
        try:
            while waiting or any(worker.task for worker in workers):
                yield from self._step(workers, waiting)
        finally:
            _stop(workers)

    def _step(self, workers: list[_Worker], waiting: deque[_Task]) -> Iterator[int]:
        by_connection = {worker.connection: worker for worker in workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                message: tuple[str, Any] = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._lost(worker, waiting)
                workers[workers.index(worker)] = _Worker(worker.job)
                continue
            yield from self._heard(worker, *message)
            if worker.ready and worker.task is None and waiting:
                worker.give(waiting.popleft())

    def _heard(self, worker: _Worker, kind: str, value: Any) -> Iterator[int]:
        task = worker.task
        if kind == "error":
            raise UserError(value)
        if kind == "failure":
            worker.failure = value
        elif kind == "ready":
            worker.ready = True
        elif task and kind == "decoding":
            task.decoding = value
        elif task and kind == "clip" and value > task.done:
            # A shard that is done again reports its clips again; they count once.
            task.done = value
            yield value
        elif kind == "done":
            worker.task = None

    def _lost(self, worker: _Worker, waiting: deque[_Task]) -> None:
        """Note a death and put the shard back, in front."""
        self.deaths += 1
        task, cause = worker.task, worker.cause()
        worker.connection.close()
        if task is None:
            self.idle_deaths += 1
            if self.idle_deaths > MAX_DEATHS * len(self.devices):
                raise UserError(f"encode: {self.idle_deaths} workers died before they had a shard ({cause})")
            return
        print(f"encode: a worker died on {task.shard.name} ({cause}); doing it again", file=sys.stderr, flush=True)
        task.died()
        if task.hopeless:
            raise UserError(
                f"{task.shard.name}: {self.deaths} workers died and no single clip is to blame ({cause}); "
                "exit code -9 is often too little memory: fewer --workers or a smaller --batch-size"
            )
        self.redone.append(task.shard.name)
        waiting.appendleft(task)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        # One that works stops at once; its shard has no final name yet.
        if worker.task is not None:
            worker.process.terminate()
        worker.connection.close()
    deadline = time.monotonic() + _STOP_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()


def _serve(connection: Connection, job: EncodeJob) -> None:
    """A worker: shards as they come, until the pipe ends."""
    # Ctrl-C goes to the whole process group; the parent stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with disk_errors(job.folder), ThreadPoolExecutor(job.decode_threads) as threads:
            encoder = job.load()
            connection.send(("ready", None))
            while True:
                shard, suspected, deadly = connection.recv()
                watch = partial(_send, connection, "decoding")
                rows = write_shard(shard, job, encoder, threads, Suspicion(watch, deadly) if suspected else None)
                for number, _ in enumerate(rows, start=1):
                    connection.send(("clip", number))
                connection.send(("done", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone, or has no more work.
        return
    except UserError as error:
        _send(connection, "error", str(error))
    except Exception:
        # A fault of the program or the GPU: counted as a death, as a fresh process may be spared it.
        traceback.print_exc()
        _send(connection, "failure", traceback.format_exc().strip().splitlines()[-1])
        sys.exit(1)


def _send(connection: Connection, kind: str, value: Any) -> None:
    connection.send((kind, value))
