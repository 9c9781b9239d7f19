"""Starting tiny pretraining runs with planted faults, and reading what they left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from tiny_shards import MODEL_OVERRIDES

SCRIPT = Path(__file__).parent / "faulty_pretrain.py"
SETTINGS = [
    *MODEL_OVERRIDES,
    "run.seed=3",
    "data.micro_batch_size=2",
    "data.global_batch_size=8",
    "data.draw_size=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=2",
    "training.precision=fp32",
    "training.save_every=5",
]


def command(folder: Path, name: str, *overrides: str, ranks: int = 2, launch: tuple[str, ...] = ()) -> list[str]:
    """The command line of a run `name` below `folder`, whose shards are in `folder`/shards."""
    empty = folder / "empty.yaml"
    empty.touch()
    launcher = launch or ("--standalone", "--nproc-per-node", str(ranks))
    files = [f"run.output_dir={folder / name}", f"data.shards=[{folder / 'shards'}]"]
    start = [sys.executable, "-m", "torch.distributed.run", *launcher, str(SCRIPT), "--config", str(empty)]
    return [*start, *SETTINGS, *files, *overrides]


def environment(run_dir: Path, faults: list[dict[str, Any]]) -> dict[str, str]:
    """The environment that plants `faults`."""
    marks = run_dir.with_name(run_dir.name + "_marks")
    marks.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "FAULTS": json.dumps(faults), "FAULT_MARKS": str(marks), "PYTHONPATH": paths}


def run(
    folder: Path,
    name: str,
    *overrides: str,
    faults: list[dict[str, Any]],
    ranks: int = 2,
    timeout: float = 600,
    **more: Any,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output and errors together in `stdout`."""
    return subprocess.run(
        command(folder, name, *overrides, ranks=ranks, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment(folder / name, faults),
    )


def run_without_launcher(
    folder: Path, name: str, *overrides: str, faults: list[dict[str, Any]], count: int = 2, timeout: float = 600
) -> list[tuple[int, str]]:
    """Ranks that nobody ends when one of them fails; exit code and output of each.

    A rank that is still there `timeout` seconds later, or stopped when all others have left, is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = command(folder, name, *overrides)
    arguments = [sys.executable, *arguments[arguments.index(str(SCRIPT)) :]]
    shared = environment(folder / name, faults) | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            arguments,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    deadline = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        alive = [rank for rank in ranks if rank.poll() is None]
        if len(alive) < len(ranks) and all(psutil.Process(rank.pid).status() == "stopped" for rank in alive):
            break
        time.sleep(0.2)
    for rank in ranks:
        rank.kill()
    outputs = [rank.communicate()[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step, as the last life that did it has it."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {values["step"]: values["loss"] for values in map(json.loads, lines)}
