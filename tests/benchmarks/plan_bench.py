"""Planning and sharing out a step: processor time, and what memory grows, however large the data set.

    python tests/benchmarks/plan_bench.py

Batches of the paper's stages on 375 replicas, from groups of made-up samples whose numbers are computed, so that the
time is the plan's alone; index_bench.py plans on a real index.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report

from megatron_video.config_io import load_config
from training.config import PRESET_DIR, PretrainConfig
from training.data_mix import is_image
from training.data_plan import DataPlan
from training.run_plan import automatic_sizes
from training.sample_groups import GroupKey, SampleGroup
from training.simulate_balance import Numbered, flops_of

PRESETS = ("step_video_30b_t2i_256_s1", "step_video_30b_t2vi_192_s1", "step_video_30b_t2vi_540_s1")
COLUMNS = ["preset", "samples", "samples_a_step", "step_ms", "rank_share_ms", "late_ms", "peak_kib"]
LATE = 10**9


def main(argv: Sequence[str] | None = None) -> None:
    """Time all presets; print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000_000, 2_000_000_000])
    parser.add_argument("--replicas", type=int, default=375)
    parser.add_argument("--steps", type=int, default=50, help="timed; the median counts")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "plan.json")
    arguments = parser.parse_args(argv)
    rows = [
        measure(preset, samples, arguments.replicas, arguments.steps)
        for preset in PRESETS
        for samples in arguments.samples
    ]
    report.print_table(rows, COLUMNS)
    report.write(arguments.out, {"replicas": arguments.replicas, "steps": arguments.steps}, rows, {})


def measure(preset: str, samples: int, replicas: int, steps: int) -> dict[str, Any]:
    """One preset on `samples` samples, shared equally between its buckets."""
    plan = make_plan(load_config(PretrainConfig, preset, [], PRESET_DIR), samples)
    tracemalloc.start()
    plan.rank_share(0, replicas // 2, replicas)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "preset": preset,
        "samples": samples,
        "samples_a_step": round(plan.samples_per_step()),
        "step_ms": median_ms(plan.step, steps),
        "rank_share_ms": median_ms(lambda step: plan.rank_share(step, replicas // 2, replicas), steps),
        # As far as no run comes: a position costs nothing to reach.
        "late_ms": median_ms(lambda step: plan.rank_share(LATE + step, replicas // 2, replicas), steps),
        "peak_kib": peak // 1024,
    }


def make_plan(config: PretrainConfig, samples: int) -> DataPlan:
    """The preset's plan with costs in FLOPs."""
    buckets = list(config.data.buckets or [])
    groups: dict[GroupKey, SampleGroup] = {("made up", name): Numbered(samples // len(buckets)) for name in buckets}
    drawn = [name for name in buckets if config.data.images_per_video is None or not is_image(name)]
    automatic = config.data.bucket_micro_batch_sizes == "auto"
    sizes = automatic_sizes(config.model, buckets, dict.fromkeys(drawn, 1.0), config.data)[0] if automatic else None
    return DataPlan(groups, config.data, 0, "bench", sizes=sizes, costs=flops_of(config, buckets))


def median_ms(run: Callable[[int], object], steps: int) -> float:
    """Median processor time of a call: what else the machine does is not in it."""
    times = []
    for step in range(steps):
        start = time.process_time()
        run(step)
        times.append(time.process_time() - start)
    return round(float(np.median(times)) * 1e3, 2)


if __name__ == "__main__":
    main()
