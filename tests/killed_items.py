"""Work that kills the process that does it.

A worker imports the module of the function that it is given, so this one imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def die(number: int) -> int:
    """`number`; 3 kills."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(mark: Path, number: int) -> int:
    """`number`; 3 kills as long as there is no `mark`, which it leaves."""
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_and_tell(folder: str) -> None:
    """Leave a file whose name is the process id, and sleep."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


def kill_reader(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row; a clip with `crash` in its path kills who reads it."""
    if "crash" in row["source"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return [row]


def kill_batch_reader(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`kill_reader` over several rows."""
    return [row for one in rows for row in kill_reader(one)]
