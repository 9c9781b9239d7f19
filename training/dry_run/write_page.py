"""docs/planner/dry_run_30b.md: the dry run of the 30B at 3,000 GPUs. `python -m training.dry_run.write_page`."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training.layout_matrix.report import markdown_table

OUT = Path(__file__).parents[2] / "docs" / "planner" / "dry_run_30b.md"
COMMAND = [
    *("megatron-video", "pretrain", "--config", "step_video_30b_t2vi_540_s1", "--dry-run"),
    *("--cluster", "h800_step_video", "--skip", "data,checkpoint,disk"),
]
# Of the columns of --ranks, those that differ between ranks.
_COLUMNS = (
    "rank",
    "dp",
    "tp",
    "layers",
    "micro_batches",
    "optimizer_bytes",
    "model_state_bytes",
    "tp_group",
    "dp_group",
)
_SHOWN = (0, 1, 7, 8, 1500, 2991, 2992, 2999)


def page() -> str:
    """Run it, and what it said and took.

    Raises:
        RuntimeError: it refuses the run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "ranks.csv"
        text, took = measured([*COMMAND, "--ranks", str(table)])
        with open(table, encoding="utf-8") as file:
            ranks = list(csv.DictReader(file))
    rows = [[ranks[number][name] for name in _COLUMNS] for number in _SHOWN]
    return "\n\n".join(
        [
            "# Dry run of the 30B at 3,000 GPUs",
            "Written by `python -m training.dry_run.write_page`. The paper's first 540P stage on its cluster; there "
            "are neither its data nor a disk for its checkpoints here, so these checks are left out by name.",
            took,
            f"    {' '.join(COMMAND)}",
            f"```\n{text.strip()}\n```",
            f"Some of the {len(ranks):,} lines that `--ranks FILE` writes, and some of their columns (`0-2992/8`: "
            "every eighth rank from 0 to 2992):",
            markdown_table(list(_COLUMNS), rows),
        ]
    )


def measured(command: list[str]) -> tuple[str, str]:
    """What a command says, and a line on what it took."""
    load, started = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen([sys.executable, "-m", *_as_module(command)], stdout=said)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        said.seek(0)
        text = said.read()
    return text, (
        f"It took {used.ru_utime + used.ru_stime:.1f} s of one core, imports included, and "
        f"{used.ru_maxrss / 1024:,.0f} MiB at most; {wall:.0f} s by the clock, on {os.cpu_count()} cores that others "
        f"used as well (load {load:.0f} when it began)."
    )


def _as_module(command: list[str]) -> list[str]:
    return [command[0].replace("-", "_"), *command[1:]]


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(page() + "\n", encoding="utf-8")
    print(OUT)
