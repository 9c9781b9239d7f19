"""Writing shards: ours (index, crc32 of each sample, checksum of the tar) against webdataset.ShardWriter.

    python tests/benchmarks/shard_write_bench.py

Both get the same tensors and make the same safetensors payloads of them; the tars have the same members and bytes in
them. Ours calls fsync, webdataset does not; with `synced` files and folder are fsync'ed after either, inside the time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import children
import report
import torch
import webdataset

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.shard_schema import MEMBER_SUFFIXES, ShardSample, encode_sample
from megatron_video.shards import ShardWriter

COLUMNS = ["writer", "synced", "mb_per_s", "mb_per_cpu_s", "wall_s", "cpu_s", "same_content"]


def samples_of(bucket: Bucket, count: int, llm_width: int, channels: int) -> list[ShardSample]:
    """Random samples with the shapes of real ones."""
    frames, height, width = bucket.latent_shape
    torch.manual_seed(0)
    moments = torch.randn(frames, channels, height, width).bfloat16()
    llm, clip = torch.randn(120, llm_width).bfloat16(), torch.randn(77, 1024).bfloat16()
    # Other bytes in each, without the time of making them.
    return [
        ShardSample(f"clip-{number:06d}", moments.roll(number), llm.roll(number), clip, {"caption": "a caption"})
        for number in range(count)
    ]


def write_ours(samples: Sequence[ShardSample], bucket: Bucket, folder: Path, per_shard: int) -> None:
    """As `data encode` writes them."""
    for number, start in enumerate(range(0, len(samples), per_shard)):
        with ShardWriter(folder, f"shard-{number:06d}.tar") as writer:
            for sample in samples[start : start + per_shard]:
                writer.add(sample, bucket)


def write_webdataset(samples: Sequence[ShardSample], bucket: Bucket, folder: Path, per_shard: int) -> None:
    """As webdataset's pages have it."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=per_shard, verbose=0) as sink:
        for sample in samples:
            payloads = encode_sample(sample)
            sink.write({"__key__": sample.key, **{MEMBER_SUFFIXES[name]: data for name, data in payloads.items()}})


WRITERS = {"ours": write_ours, "webdataset": write_webdataset}


def main(argv: Sequence[str] | None = None) -> None:
    """Time both writers with and without fsync, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", type=parse_bucket, default=parse_bucket("68x544x992"))
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--llm-width", type=int, default=6144)
    parser.add_argument("--channels", type=int, default=128, help="means and log-variances together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="write below this folder (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "shard_write.json")
    arguments = parser.parse_args(argv)
    samples = samples_of(arguments.bucket, arguments.samples, arguments.llm_width, arguments.channels)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        rows, megabytes = compare(samples, arguments.bucket, Path(scratch), arguments.per_shard, arguments.repeats)
    report.print_table(rows, COLUMNS)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "folder")}
    report.write(arguments.out, settings | {"bucket": arguments.bucket.name}, rows, {"megabytes": megabytes})


def compare(
    samples: Sequence[ShardSample], bucket: Bucket, scratch: Path, per_shard: int, repeats: int
) -> tuple[list[dict[str, Any]], float]:
    """One row a writer and mode, and the megabytes of the samples."""
    # Also warms both up.
    contents = {name: _contents_after(name, samples, bucket, scratch / name, per_shard) for name in WRITERS}
    same = contents["ours"] == contents["webdataset"]
    megabytes = sum(sum(map(len, encode_sample(sample).values())) for sample in samples) / 1e6
    modes = [(name, synced) for name in WRITERS for synced in (False, True)]
    ways = {
        f"{name} {synced}": partial(_once, name, synced, samples, bucket, scratch / name, per_shard)
        for name, synced in modes
    }
    times = children.in_turns(ways, repeats)
    rows = []
    for name, synced in modes:
        figures = times[f"{name} {synced}"]
        median = children.medians(figures)
        rates = {"mb_per_s": megabytes / median["wall_s"], "mb_per_cpu_s": megabytes / median["cpu_s"]}
        rows.append({"writer": name, "synced": synced, "same_content": same, **rates, **median, "repetitions": figures})
    return rows, megabytes


def _once(
    name: str, synced: bool, samples: Sequence[ShardSample], bucket: Bucket, folder: Path, per_shard: int
) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    # What earlier repetitions left to be written must not be waited for in this one.
    os.sync()

    def work() -> None:
        WRITERS[name](samples, bucket, folder, per_shard)
        if synced:
            for path in (folder, *folder.rglob("*")):
                _sync(path)

    return children.measured(work)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contents_after(
    name: str, samples: Sequence[ShardSample], bucket: Bucket, folder: Path, per_shard: int
) -> dict[str, int]:
    WRITERS[name](samples, bucket, folder, per_shard)
    return {member: hash(data) for path in sorted(folder.glob("*.tar")) for member, data in _members(path)}


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            yield member.name, file.read() if file else b""


if __name__ == "__main__":
    main()
