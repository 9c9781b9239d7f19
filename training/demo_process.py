"""Child processes of the demo: output streamed to the console and a log, nothing left running, killed on request."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

POLL_SECONDS = 0.1
# Time that a command has to save when the demo is interrupted.
GRACE_SECONDS = 30.0


def run_streamed(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> int:
    """Run `command` to its end and return its exit code; negative is a signal, as in `subprocess`.

    Args:
        command: program and arguments.
        log: gets the command line and all output; a log of an earlier try is kept above it.
        environment: variables to add to those of this process.
        kill_when: asked several times a second; once it says true, the whole process tree gets SIGKILL.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(environment or {})},
            # Its own group: Ctrl-C reaches this process only, which then ends the whole tree.
            start_new_session=True,
        )
        with _ended_with_us(process), _killer(process, kill_when):
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                print(f"    {line}", end="", flush=True)
            return process.wait()


def kill_tree(process: subprocess.Popen[str], grace_seconds: float = 0.0) -> None:
    """End a child process and all its descendants, and wait until they are gone.

    Args:
        process: the child.
        grace_seconds: if not 0, SIGTERM comes first, and SIGKILL for what is left after so long.
    """
    try:
        # torchrun starts each rank in a session of its own, so a signal to the process group would miss them.
        descendants = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if grace_seconds:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    # The parent goes first: it must not see its children die and end in good order.
    process.kill()
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.wait()
    psutil.wait_procs(descendants, timeout=30)


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever ends this process (an error, Ctrl-C, SIGTERM) ends the child's tree too, which may save first."""
    with _sigterm_raises():
        try:
            yield
        finally:
            if process.poll() is None:
                kill_tree(process, GRACE_SECONDS)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _killer(process: subprocess.Popen[str], kill_when: Callable[[], bool] | None) -> Iterator[None]:
    if kill_when is None:
        yield
        return
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_SECONDS):
            if kill_when():
                kill_tree(process)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
