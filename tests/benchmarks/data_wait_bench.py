"""How long a training step waits for its data at the paper's rate: T2I at 256 px, 56 images/s on a node of TP 8.

    python tests/benchmarks/data_wait_bench.py

With TP 8 every rank of the node builds the node's whole batch: 40 images of real size every 40 / 56 s. This is one such
rank: the real loader (plan, reads with checksums, posterior and noise draws, padding) feeds a loop whose step sleeps
for as long as the GPU would compute, so that the host is as free as it is beside a GPU. Waits are taken as the training
loop takes them, without what it takes to free a batch. The first steps, which fill the prefetch, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import torch
from loader_bench import IMAGES_PER_NODE_SECOND, RANKS_PER_NODE, write_shards

from megatron_video.dit import DiTConfig
from megatron_video.flow_matching import TimeDensity
from megatron_video.noise import NoiseSource
from training.config import PretrainConfig
from training.data import BatchBuilder, StepBatches, iterate_steps
from training.data_config import DataConfig
from training.data_set import TrainingData
from training.run_plan import plan_run
from training.telemetry import Stopwatch

COLUMNS = ["workers", "step_s", "mean_wait_s", "largest_wait_s", "wait_share", "cpu_s_a_step", "cores"]
IMAGES = 40
_WARM_UP = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Write shards, run the loop with every number of workers, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument("--images", type=int, default=IMAGES, help="of a step")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--folder", type=Path, help="work below this folder")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "data_wait.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = argparse.Namespace(
        bucket="1x256x256", samples=arguments.samples, per_shard=64, llm_tokens=320, llm_width=6144, channels=64
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        write_shards(sizes, Path(scratch) / "shards")
        rows = [measure(arguments, Path(scratch) / "shards", workers) for workers in arguments.workers]
    report.print_table(rows, COLUMNS)
    best = min(rows, key=lambda row: float(row["wait_share"]))
    summary = {
        "smallest share of a step that waits for data": best["wait_share"],
        "with workers": best["workers"],
        "cores of a node of 8 ranks": best["cores"] * RANKS_PER_NODE,
    }
    print(json.dumps(summary, indent=1))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "folder")}
    report.write(arguments.out, settings, rows, summary)


def measure(arguments: argparse.Namespace, shards: Path, workers: int) -> dict[str, Any]:
    """One run of the loop."""
    compute = arguments.images / IMAGES_PER_NODE_SECOND
    steps, last = rank_batches(shards, arguments.images), _WARM_UP + arguments.steps
    batches = iterate_steps(steps, 0, last, workers, arguments.prefetch)
    waits, watch, cpu = [], Stopwatch(), _cpu_seconds()
    for step in range(last):
        watch.lap()
        data = next(batches)
        waits.append(watch.lap())
        assert sum(len(batch.latents) for batch in data.batches) == arguments.images
        if step == _WARM_UP - 1:
            cpu = _cpu_seconds()
        # Giving 170 MB of ordinary memory back takes 17 ms; a GPU's batches lie in page-locked memory that is kept.
        del data
        time.sleep(compute)
    counted = waits[_WARM_UP:]
    del batches
    # Of workers once they have ended; the thread's are this process's own.
    used = (_cpu_seconds() - cpu) / (arguments.steps + (_WARM_UP if workers else 0))
    wait = sum(counted) / len(counted)
    return {
        "workers": workers,
        "step_s": compute + wait,
        "mean_wait_s": wait,
        "largest_wait_s": max(counted),
        "wait_share": wait / (compute + wait),
        "cpu_s_a_step": used,
        "cores": used / (compute + wait),
    }


def rank_batches(shards: Path, images: int) -> StepBatches:
    """The data of one replica that takes `images` images a step in one micro-batch, for the released model's sizes."""
    config = PretrainConfig(
        model=DiTConfig(), data=DataConfig(shards=[str(shards)], micro_batch_size=images, global_batch_size=images)
    )
    data = TrainingData([str(shards)])
    builder = BatchBuilder(data, NoiseSource(0, "bench"), TimeDensity(), 0.1, torch.bfloat16, config.model)
    return StepBatches(builder, plan_run(config, data), 0, 1)


def _cpu_seconds() -> float:
    """CPU time of this process, and of its children that have ended."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
