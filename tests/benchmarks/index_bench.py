"""Starting on a shard index of 100 million samples: time, and memory of the process before and after.

    python tests/benchmarks/index_bench.py                       # 100 million samples, about 20 GB on disk, 20 minutes
    python tests/benchmarks/index_bench.py --samples 1000000

The index is synthetic (there are no tars): keys, places, sizes and lengths as `data encode` would write them, in 12
buckets, with weights. index.parquet is mapped once (`build`); then a fresh process opens it as a training does, plans
steps and looks up every sample of them (`start`, `plan`), and another one does it with all of it in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import children
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import report
import torch

from megatron_video.buckets import parse_bucket
from megatron_video.shard_index_open import build_index
from megatron_video.shard_schema import INDEX_FILE, INDEX_SCHEMA, INFO_FILE, DatasetInfo, write_null_text

BUCKETS = [f"{frames}x{size}" for frames in (1, 68, 136, 204) for size in ("544x992", "992x544", "736x736")]
PER_SHARD, CHUNK = 1024, 1 << 20
SUFFIX = b"-000003-000207"
COLUMNS = ["what", "seconds", "rss_growth_mb", "anonymous_growth_mb", "microseconds_a_sample"]


def main(argv: Sequence[str] | None = None) -> None:
    """Make the index, map it, start on it twice; print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=50, help="steps that are planned and looked up")
    parser.add_argument("--batch", type=int, default=2048, help="samples of a step")
    parser.add_argument("--folder", type=Path, help="work below this folder (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "index.json")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.start:
        print(json.dumps(start(arguments.start, arguments.steps, arguments.batch)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        rows, sizes = measure(Path(scratch), arguments.samples, arguments.steps, arguments.batch)
    report.print_table(rows, COLUMNS)
    settings = {name: getattr(arguments, name) for name in ("samples", "steps", "batch")}
    report.write(arguments.out, settings, rows, sizes)


def measure(folder: Path, samples: int, steps: int, batch: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row for the build and for each of two starts; bytes of the files."""
    write_index(folder, samples)
    before, since = memory(), time.perf_counter()
    index = build_index(folder)
    built = {"what": "build (once)", "seconds": time.perf_counter() - since, **growth(before)}
    sizes = {
        "index.parquet bytes": (folder / INDEX_FILE).stat().st_size,
        "index.map bytes": index.path.stat().st_size,
        "bytes a sample": index.path.stat().st_size / samples,
    }
    rows = [built]
    for what in ("first start", "second start"):
        command = children.python(__file__, "--start", str(folder), "--steps", str(steps), "--batch", str(batch))
        figures = json.loads(children.run_child(command).output.splitlines()[-1])
        rows += [{"what": f"{what}: {part}", **values} for part, values in figures.items()]
    return rows, sizes


def start(folder: Path, steps: int, batch: int) -> dict[str, dict[str, float]]:
    """What a rank does with the index before and in its first steps; imports are not counted."""
    from training.data_config import DataConfig
    from training.data_plan import DataPlan
    from training.data_set import TrainingData

    before, since = memory(), time.perf_counter()
    config = DataConfig(shards=[str(folder)], global_batch_size=batch)
    data = TrainingData.open(config)
    plan = DataPlan(data.groups(), config, seed=1, stage="bench")
    identity = data.fingerprint(), plan.identity()
    opened = {"seconds": time.perf_counter() - since, **growth(before)}
    since, found = time.perf_counter(), 0
    for step in range(steps):
        # Far apart, as if the run had gone on for long between.
        for planned in plan.step(step * 9973):
            data.llm_tokens(planned.samples)
            found += sum(len(data.where(int(sample))) > 0 for sample in planned.samples)
    seconds = time.perf_counter() - since
    assert all(identity)
    assert found == steps * batch
    planned_all = {"seconds": seconds, **growth(before), "microseconds_a_sample": 1e6 * seconds / found}
    return {"open and first plan": opened, f"{steps} steps planned and looked up": planned_all}


def write_index(folder: Path, samples: int) -> None:
    """An index as `data encode` would leave it, and the files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_null_text(folder, torch.zeros(2, 8), torch.zeros(5, 6))
    with pq.ParquetWriter(folder / INDEX_FILE, INDEX_SCHEMA, compression="zstd") as writer:
        for table in tables(samples):
            writer.write_table(table)
    names = [_shard(number) for number in range(-(-samples // PER_SHARD))]
    shards = [{"name": name, "bytes": 1 << 30, "samples": PER_SHARD, "xxh3_128": "0" * 32} for name in names]
    info = DatasetInfo("vae", "text", 64, 8, 6, 5, samples=samples, shards=shards)
    (folder / INFO_FILE).write_text(json.dumps(asdict(info)))


def tables(samples: int) -> Iterator[pa.Table]:
    """The rows, CHUNK at a time; buckets one after the other."""
    generator = np.random.default_rng(0)
    for first in range(0, samples, CHUNK):
        numbers = np.arange(first, min(first + CHUNK, samples))
        count, buckets = len(numbers), numbers * len(BUCKETS) // samples
        shapes = np.array([[*parse_bucket(name), *parse_bucket(name).latent_shape] for name in BUCKETS])[buckets]
        sizes = {
            "latent": shapes[:, 3:].prod(axis=1) * 128 * 2 + 200,
            "text": generator.integers(1 << 20, 4 << 20, count),
        }
        sizes["json"] = generator.integers(300, 900, count)
        offsets = np.cumsum(sizes["latent"] + sizes["text"] + sizes["json"])
        columns: dict[str, Any] = {
            "key": keys(numbers),
            "shard": pa.array([_shard(n) for n in np.unique(numbers // PER_SHARD)]).take(
                pa.array(numbers // PER_SHARD - numbers[0] // PER_SHARD)
            ),
            "bucket": pa.array(BUCKETS).take(pa.array(buckets)),
        }
        names = ("frames", "height", "width", "latent_frames", "latent_height", "latent_width")
        columns |= {name: shapes[:, place] for place, name in enumerate(names)}
        columns |= {"llm_tokens": generator.integers(8, 320, count)}
        columns |= {f"{name}_offset": offsets + place for place, name in enumerate(sizes)}
        columns |= {f"{name}_size": size for name, size in sizes.items()}
        columns |= {"checksum": generator.integers(0, 1 << 32, count), "caption_tokens": pa.nulls(count)}
        columns |= {"subset": pa.nulls(count), "weight": generator.random(count).astype(np.float32) * 2}
        yield pa.table([columns[name] for name in INDEX_SCHEMA.names], names=INDEX_SCHEMA.names).cast(INDEX_SCHEMA)


def keys(numbers: np.ndarray) -> pa.Array:
    """Unique keys like those of real samples: 24 hexadecimal digits and a span."""
    # Odd factor: no two numbers share a product modulo 2^64.
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    shifts = np.arange(60, -4, -4).astype(np.uint64)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[(mixed[:, None] >> shifts) & np.uint64(15)]
    width = 8 + len(shifts) + len(SUFFIX)
    text = np.empty((len(numbers), width), np.uint8)
    text[:, :8], text[:, 8 : 8 + len(shifts)] = digits[:, ::-1][:, :8], digits
    text[:, 8 + len(shifts) :] = np.frombuffer(SUFFIX, np.uint8)
    offsets = np.arange(0, (len(numbers) + 1) * width, width, dtype=np.int32)
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(text))


def memory() -> dict[str, float]:
    """Megabytes of this process: all that is resident, and what is its own and cannot be dropped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")}
    return {"rss": found["VmRSS"], "anonymous": found["RssAnon"]}


def growth(before: dict[str, float]) -> dict[str, float]:
    """Megabytes since `before`."""
    now = memory()
    return {f"{name}_growth_mb": now[name] - before[name] for name in before}


def _shard(number: int) -> str:
    return f"shard-{number:06d}.tar"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
