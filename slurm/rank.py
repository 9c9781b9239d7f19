"""What every rank of a training starts as: `python -m slurm.rank ATTEMPT -m training.pretrain ...`, or a script's path.

Exit codes survive neither srun nor torchrun, so a rank that ends badly leaves its own in ATTEMPT/failures. Runs in the
container, on whatever Python that has: nothing but the standard library is imported before the training.
"""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import platform
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.numa import bind_to_gpu

FAILURES_FOLDER, NODES_FOLDER = "failures", "nodes"
STACKS_SIGNAL = signal.SIGURG
"""Asks for stacks. Whoever has no handler for it, such as torchrun's agent, passes it over."""
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "numpy", "nvidia-nccl-cu12")


def main(argv: Sequence[str]) -> None:
    """Run a module or script as if it had been started itself.

    Raises:
        SystemExit: as the training does.
    """
    attempt, *command = argv
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    cpus = bind_to_gpu(local_rank)
    if local_rank == 0:
        _record_node(Path(attempt), rank, cpus)
    stacks = _write_stacks_when_asked(Path(attempt), rank)
    code: int | str | None = 1
    error = ""
    try:
        _run(command)
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        if stacks is not None and not stacks.stat().st_size:
            stacks.unlink()
        if code not in (0, None):
            _record_failure(Path(attempt), rank, code, error)


def _run(command: Sequence[str]) -> None:
    if command[0] == "-m":
        sys.argv = [command[1], *command[2:]]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def _write_stacks_when_asked(attempt: Path, rank: int) -> Path | None:
    """Answer STACKS_SIGNAL with the stacks of all threads, also while Python's own loop is stuck; the file."""
    path = stacks_file(attempt, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Open for as long as the process lives.
        faulthandler.register(STACKS_SIGNAL, file=path.open("w"), all_threads=True)
    except OSError as problem:
        print(f"slurm.rank: {path}: {problem}", file=sys.stderr)
        return None
    # Loader processes inherit it, and would answer for a rank that cannot.
    os.register_at_fork(after_in_child=lambda: faulthandler.unregister(STACKS_SIGNAL))
    return path


def stacks_file(attempt: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it is asked to."""
    return attempt / "stacks" / f"rank_{rank:05d}.txt"


def _record_node(attempt: Path, rank: int, cpus: Sequence[int]) -> None:
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _write(
        attempt / NODES_FOLDER / f"{node}.json",
        {
            "node": node,
            # As the training knows it, which need not be SLURM's name.
            "host": platform.node(),
            "ranks": [rank, rank + ranks - 1],
            "cpus_of_rank": list(cpus),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        },
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _record_failure(attempt: Path, rank: int, code: int | str | None, error: str) -> None:
    record = {
        "rank": rank,
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        # Python leaves with 1 when it is given a text.
        "code": code if isinstance(code, int) else 1,
        "error": error[:2000],
        "time": time.time(),
    }
    _write(attempt / FAILURES_FOLDER / f"rank_{rank:05d}.json", record)


def _write(path: Path, values: dict[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(path)
    except OSError as problem:  # a full disk must not hide the error that is being told
        print(f"slurm.rank: {path}: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
