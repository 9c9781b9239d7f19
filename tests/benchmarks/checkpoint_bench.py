"""How long training waits for a checkpoint: saved behind it, against saved while it waits, of the same state.

Both save in turns in one process, on the same disk; training steps run while the first is written, and are compared
with steps beside which nothing is written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from cpu_step_bench import CHANNELS, CLIP_CHANNELS, LLM_CHANNELS, make_batch

from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import ParallelConfig, one_process
from training.checkpoint import TrainState
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_files import read_state_values
from training.checkpoint_saver import CheckpointSaver, SaveReport
from training.config import AdamWConfig, PretrainConfig
from training.data import Batch
from training.ema import EMA
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import train_step

COLUMNS = ("save", "blocked_s", "whole_s", "gigabytes", "gigabytes_per_s")
TARGET = 0.05


@dataclass
class Training:
    """A model that trains and saves."""

    model: list[Any]
    optimizer: Any
    ema: EMA
    config: PretrainConfig
    batch: Batch

    def step(self) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        set_learning_rate(self.optimizer, 1e-4, 0.01)
        train_step(self.model, self.optimizer, [self.batch])
        self.ema.update()
        return time.perf_counter() - start

    def save(self, saver: CheckpointSaver, number: int) -> float:
        """Seconds that training waits."""
        start = time.perf_counter()
        saver.save(self.model, self.optimizer, TrainState(step=number), self.config, self.ema)
        return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write results."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with one_process() as parallel, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        training = _build(parallel, options)
        rows, steps = _measure(training, Path(folder), options)
    summary = _summary(rows, steps)
    report.print_table([*rows], COLUMNS)
    print(
        f"blocked: {summary['blocked_s']['asynchronous']:.3f} s of {summary['blocked_s']['synchronous']:.3f} s, "
        f"{summary['share']:.1%} (median; target below {TARGET:.0%}), least of each "
        f"{summary['least blocked_s']['share']:.1%}; a step while files are written takes "
        f"{summary['step_while_writing']:.2f} times as long"
    )
    settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
    report.write(options.out, settings, [*rows, {"steps": steps}], summary)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--grid", type=int, nargs=3, default=[1, 8, 12], metavar=("T", "H", "W"), help="latent grid")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads: of steps and of the copy")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    parser.add_argument("--folder", type=Path, help="disk to write to (default: the one of temporary files)")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "checkpoint.json")
    return parser


def _build(parallel: ParallelConfig, options: argparse.Namespace) -> Training:
    config = DiTConfig(
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        caption_channels=[LLM_CHANNELS, CLIP_CHANNELS],
    )
    chunks = build_dit(config, parallel, torch.float32, device=torch.device("cpu"), init_seed=0)
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, AdamWConfig(), parallel)
    batch = Batch(**make_batch(0, options.grid, batch=1))
    return Training(model, optimizer, EMA(optimizer, 0.99), PretrainConfig(model=config), batch)


def _measure(
    training: Training, folder: Path, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    reports: list[SaveReport] = []
    savers = {
        name: CheckpointSaver(folder / name, CheckpointConfig(asynchronous=name == "asynchronous"), 1, reports.append)
        for name in ("synchronous", "asynchronous")
    }
    rows: list[dict[str, Any]] = []
    steps: dict[str, list[float]] = {"writing": [], "quiet": []}
    # The first of each takes memory and plans anew.
    for number in range(options.repeats + 1):
        # A busy spell of the machine or its disk hits both.
        for name in sorted(savers, reverse=number % 2 == 1):
            training.step()
            blocked = training.save(savers[name], number + 1)
            writing = _steps_while(training, lambda saver=savers[name]: saver.busy)
            savers[name].wait()
            quiet = [training.step() for _ in range(max(2, len(writing)))]
            if number == 0:
                continue
            if name == "asynchronous":
                # Of the last one, a part was beside nothing.
                steps["writing"] += writing[:-1]
                steps["quiet"] += quiet
            rows.append(_row(name, number, blocked, reports[-1]))
    _check_alike(folder)
    return rows, steps


def _steps_while(training: Training, busy: Callable[[], bool]) -> list[float]:
    taken = []
    while busy():
        taken.append(training.step())
    return taken


def _row(name: str, number: int, blocked: float, saved: SaveReport) -> dict[str, Any]:
    size = saved.bytes / 1e9
    return {
        "save": name,
        "number": number,
        "blocked_s": blocked,
        "whole_s": saved.seconds,
        "gigabytes": size,
        "gigabytes_per_s": size / saved.seconds,
    }


def _check_alike(folder: Path) -> None:
    """Both kinds must have written as much."""
    sizes = {
        sum(file.size for file in read_state_values(path)[1].values()) for path in folder.glob("*/checkpoints/step_*")
    }
    # Metadata and configuration name folders of different lengths.
    if max(sizes) - min(sizes) > 10_000:
        raise RuntimeError(f"the two wrote {sizes} bytes; nothing was measured")


def _summary(rows: list[dict[str, Any]], steps: dict[str, list[float]]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        quantity: {
            name: statistics.median(row[quantity] for row in rows if row["save"] == name)
            for name in ("synchronous", "asynchronous")
        }
        for quantity in ("blocked_s", "whole_s", "gigabytes")
    }
    summary["share"] = summary["blocked_s"]["asynchronous"] / summary["blocked_s"]["synchronous"]
    summary["target"] = TARGET
    least = {
        name: min(row["blocked_s"] for row in rows if row["save"] == name) for name in ("synchronous", "asynchronous")
    }
    summary["least blocked_s"] = least | {"share": least["asynchronous"] / least["synchronous"]}
    quiet = statistics.median(steps["quiet"])
    summary["step_s"] = {name: statistics.median(taken) if taken else None for name, taken in steps.items()}
    summary["step_while_writing"] = statistics.median(steps["writing"]) / quiet if steps["writing"] else float("nan")
    return summary


if __name__ == "__main__":
    main()
