"""Ranks on this machine that stay alive: one pool of processes serves torch.distributed worlds of up to its own size.

Importing torch and megatron-core takes seconds a process, far more than a layout check itself. On the CPU the ranks are
therefore forked from one process that has imported them once, and every call forms a world of its first n ranks.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

from megatron_video.errors import UserError

HOST = "127.0.0.1"
# After one rank failed, the others may still say why; most only wait for it.
GRACE_SECONDS = 3
_IMPORTED_ONCE = ["megatron_video.dit", "training.checkpoint", "training.train_step"]

_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

Device = Literal["cpu", "cuda"]


class RankError(RuntimeError):
    """A rank raised, died or took too long; the message holds every rank's own words."""


def default_device() -> Device:
    """GPUs where there are any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _World:
    """One call's torch.distributed world."""

    number: int
    size: int
    timeout_seconds: float


class RankPool:
    """Up to `size` processes, each one rank, on the CPU (gloo) or one GPU each (NCCL).

    `run` calls a function on the first n of them. A rank that fails ends them all; the next call starts new ones.
    """

    def __init__(self, size: int, device: Device | None = None) -> None:
        self.device: Device = device or default_device()
        if self.device == "cuda" and size > torch.cuda.device_count():
            raise UserError(
                f"{size} ranks need {size} GPUs, this machine has {torch.cuda.device_count()}; "
                "ask for fewer ranks, or for device=cpu"
            )
        self.size = size
        self._worlds = 0
        self._store: dist.TCPStore | None = None
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._lifelines: list[Connection] = []

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the ranks, whatever happened."""
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int | None = None, timeout_seconds: float = 300
    ) -> list[Any]:
        """`function(*args)` on ranks 0 to `ranks` - 1 (all by default), in a torch.distributed world of that size.

        `function` must be importable. Results come in rank order.

        Raises:
            RankError: a rank raised (its traceback is in the message), died, or took too long.
        """
        count = self.size if ranks is None else ranks
        if not 1 <= count <= self.size:
            raise ValueError(f"ranks={count} must be from 1 to the pool's size={self.size}")
        if not self.alive:
            self._start()
        self._worlds += 1
        world = _World(self._worlds, count, timeout_seconds)
        for connection in self._connections[:count]:
            connection.send((function, args, world))
        answers = self._answers(count, timeout_seconds)
        failures = [f"rank {rank}: {value}" for rank, (ok, value) in answers.items() if not ok]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [answers[rank][1] for rank in range(count)]

    @property
    def alive(self) -> bool:
        """Whether every rank runs."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End the ranks; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in (*self._connections, *self._lifelines):
            connection.close()
        self._processes, self._connections, self._lifelines = [], [], []
        self._store = None

    def _start(self) -> None:
        self.close()
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        # A process that forks must not have touched CUDA, and imports of optional packages may: GPU ranks start afresh.
        context: Any = _forking_context() if self.device == "cpu" else multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            lifeline, held_by_us = context.Pipe(duplex=False)
            arguments = (theirs, lifeline, self._store.port, rank, self.device)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            lifeline.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._lifelines.append(held_by_us)

    def _answers(self, count: int, timeout_seconds: float) -> dict[int, tuple[bool, Any]]:
        """Every rank's answer by rank; after the first failure the others get a moment to tell theirs."""
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:count])}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), timeout=left):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                answers[rank] = self._receive(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        reason = "waited for another rank" if answers and not all(ok for ok, _ in answers.values()) else None
        late = reason or f"no answer within {timeout_seconds:g} s"
        return answers | {rank: (False, late) for rank in waiting.values()}

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = self._connections[rank].recv()
            return answer
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join(GRACE_SECONDS)
            # Negative: the number of the signal that ended it; -9 is mostly the kernel, out of memory.
            return False, f"the process died with exit code {process.exitcode}"


def _forking_context() -> Any:
    """Processes forked from a server that has imported what ranks need, and that sees no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    # The server keeps the environment it starts with; its numeric libraries size their thread pools by it.
    before = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
    os.environ |= _SERVER_ENVIRONMENT
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ |= {} if value is None else {name: value}
    return context


def _serve(connection: Connection, lifeline: Connection, store_port: int, rank: int, device: Device) -> None:
    _prepare_process(lifeline, rank, device)
    # One connection for all worlds: torch asks the name server for the address of each, and may wait 5 s for it.
    store = dist.TCPStore(HOST, store_port)
    while True:
        try:
            function, args, world = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = (True, _call_in_world(function, args, rank, world, store))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def _prepare_process(lifeline: Connection, rank: int, device: Device) -> None:
    # Ctrl-C reaches every process of the terminal; the starting process alone decides, and ends the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_starter, args=(lifeline,), daemon=True).start()
    # megatron-core writes checkpoints from child processes, which multiprocessing forbids to daemons.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    # What was imported stays; without this every call's collection would look through half a million objects of it.
    gc.freeze()
    # Advice on speed and on optional packages, once a rank.
    warnings.filterwarnings("ignore", module="megatron")


def _end_with_starter(lifeline: Connection) -> None:
    """End this rank when the process that started it is gone, even killed: a rank inside a collective sees nothing."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)


def _call_in_world(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: _World, shared: dist.Store
) -> Any:
    from megatron_video import device
    from megatron_video.parallel import destroy_parallel

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world.size)}
    timeout = timedelta(seconds=world.timeout_seconds)
    # Each world under its own prefix: no port has to be found free again.
    store = dist.PrefixStore(f"world{world.number}", shared)
    store.set_timeout(timeout)
    dist.init_process_group(device.initialize().backend, store=store, rank=rank, world_size=world.size, timeout=timeout)
    try:
        result = function(*args)
        # No rank may close its connections while another still reads from them.
        dist.barrier()
        return result
    finally:
        destroy_parallel()
        # Models hang in cycles of hooks; thousands of calls must not pile them up.
        gc.collect()
