"""Several gloo ranks that stay alive for a whole test session: starting them, not using them, is what takes time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 300


class RankPool:
    """`size` processes in one gloo world; `run` calls a function on every one of them and returns their results."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank, which must be importable; results in rank order.

        Raises:
            RuntimeError: a rank raised (its traceback is the message), died, or took too long.
        """
        for connection in self._connections:
            connection.send((function, args))
        answers = [self._receive(rank) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join()

    @property
    def alive(self) -> bool:
        """Whether every rank still runs."""
        return all(process.is_alive() for process in self._processes)

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            if self._connections[rank].poll(TIMEOUT_SECONDS):
                answer: tuple[bool, Any] = self._connections[rank].recv()
                return answer
            return False, f"no answer within {TIMEOUT_SECONDS} s"
        except EOFError:
            return False, "the process died"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
