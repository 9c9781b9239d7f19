"""`data encode`: peak memory against the length of a video, and where the time of an encode goes.

    PYTHONPATH=tests python tests/benchmarks/encode_memory_bench.py

Memory: one video of 17, 34 ... frames, each in a process of its own, encoded whole (`bucket`: as long as the video) and
with a window of 17 frames out of it. `over_pixels_mib` is the peak less the clip's bytes. Time: videos of 720p through
a Video-VAE that is far smaller than the released one, so that the share of everything else is an upper bound; seconds
of the main thread, `decode` being what it waits for the decoding thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import bench_video
import children
import report

from data_prep import encode, ingest
from data_prep.clip_encoder import ClipEncoder
from data_prep.decode import CpuDecoder
from data_prep.encode_shard import EncodeJob
from megatron_video.buckets import Bucket, parse_bucket, parse_buckets
from megatron_video.shards import ShardDataset, ShardWriter
from megatron_video.text import TextEncoders

MEMORY_COLUMNS = ["frames", "bucket", "peak_mib", "pixels_mib", "over_pixels_mib", "wall_s"]
TIME_COLUMNS = ["part", "seconds", "share"]
WINDOW = 17


def main(argv: Sequence[str] | None = None) -> None:
    """Make videos and models, encode in children, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[17, 34, 68, 136, 272, 544], help="frames")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 160), help="rows and columns, memory")
    parser.add_argument("--time-bucket", type=parse_bucket, default=parse_bucket("68x96x160"))
    parser.add_argument("--time-size", type=int, nargs=2, default=(720, 1280), help="rows and columns of the files")
    parser.add_argument("--clips", type=int, default=4, help="of the time measurement")
    parser.add_argument("--folder", type=Path, help="keep the videos and models here")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "encode_memory.json")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "BUCKET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(encode_here(Path(arguments.child[0]), arguments.child[1])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        _write_models(folder)
        rows = memory_rows(folder, arguments.lengths, *arguments.size)
        parts = time_rows(folder, arguments.time_bucket, arguments.clips, *arguments.time_size)
    report.print_table(rows, MEMORY_COLUMNS)
    report.print_table(parts, TIME_COLUMNS)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "folder", "child")}
    settings["time_bucket"] = arguments.time_bucket.name
    report.write(arguments.out, settings, rows, {"time": parts, "growth": growth(rows)})


def memory_rows(folder: Path, lengths: Sequence[int], height: int, width: int) -> list[dict[str, Any]]:
    """Peak of each length, whole and as a window."""
    rows = []
    for frames in lengths:
        part = folder / f"memory-{frames}"
        path = bench_video.video(part / "raw", "h264", frames, height, width)
        path.with_suffix(".txt").write_text("a red circle")
        for bucket in sorted({Bucket(frames, height, width), Bucket(WINDOW, height, width)}, reverse=True):
            found = _encode_in_child(folder, part, bucket)
            pixels = bucket.frames * height * width * 3 / 2**20
            row = {"frames": frames, "bucket": bucket.name, "pixels_mib": pixels, "peak_mib": found["peak_mib"]}
            rows.append({**row, "over_pixels_mib": found["peak_mib"] - pixels, "wall_s": found["total"]})
    return rows


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """MiB that the peak grows from the shortest video to the longest, whole and as a window, beside the pixels' own."""
    window = [row for row in rows if row["bucket"].startswith(f"{WINDOW}x")]
    whole = [row for row in rows if row["bucket"].startswith(f"{row['frames']}x")]
    return {
        "window_mib": window[-1]["peak_mib"] - window[0]["peak_mib"],
        "whole_mib": whole[-1]["peak_mib"] - whole[0]["peak_mib"],
        "pixels_mib": whole[-1]["pixels_mib"] - whole[0]["pixels_mib"],
    }


def time_rows(folder: Path, bucket: Bucket, clips: int, height: int, width: int) -> list[dict[str, Any]]:
    """Seconds and shares of an encode of several videos."""
    part = folder / "time"
    path = bench_video.video(folder, "h264", bucket.frames, height, width)
    (part / "raw").mkdir(parents=True, exist_ok=True)
    for number in range(clips):
        copy = part / "raw" / f"{number}.mp4"
        # A few bytes more make it a video of its own: equal files would be dropped as duplicates.
        copy.write_bytes(path.read_bytes() + _free_atom(number))
        copy.with_suffix(".txt").write_text(f"a red circle, {number}")
    found = _encode_in_child(folder, part, bucket)
    total = found["total"]
    if found["samples"] != clips:
        raise RuntimeError(f"{found['samples']} of {clips} clips were encoded")
    return [
        {"part": name, "seconds": found[name], "share": found[name] / total}
        for name in ("decode", "vae", "text", "write", "other", "total", "decode thread")
    ]


def encode_here(folder: Path, bucket: str) -> dict[str, float]:
    """Encode in this process with timers around the parts; without reading the models."""
    seconds: Counter[str] = Counter()
    parts: tuple[tuple[Any, str, str], ...] = (
        (Future, "result", "decode"),
        (CpuDecoder, "decode", "decode thread"),
        (ClipEncoder, "_moments", "vae"),
        (TextEncoders, "encode", "text"),
        (ShardWriter, "add", "write"),
        (ShardWriter, "__exit__", "write"),
        (EncodeJob, "load", "load"),
        (encode, "_encode_missing", "total"),
    )
    for owner, name, part in parts:
        setattr(owner, name, _timed(getattr(owner, name), part, seconds))
    settings = encode.EncodeSettings(parse_buckets(bucket), batch_size=1)
    models = folder.parent
    encode.run(folder / "in.parquet", folder / "out", models / "vae", models / "text", settings, decode_threads=1)
    # Loading the models encodes the empty caption once.
    seconds["total"] -= seconds["load"]
    known = sum(seconds[name] for name in ("decode", "vae", "text", "write"))
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    samples = len(ShardDataset(folder / "out"))
    return {
        **seconds,
        "samples": samples,
        "other": seconds["total"] - known,
        "peak_mib": int(peak[1]) / 1024 if peak else float("nan"),
    }


def _timed(function: Callable[..., Any], part: str, seconds: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*values: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*values, **named)
        finally:
            seconds[part] += time.perf_counter() - started  # type: ignore[assignment]

    return run


def _encode_in_child(folder: Path, part: Path, bucket: Bucket) -> dict[str, float]:
    ingest.run(part / "raw", part / "in.parquet")
    shutil.rmtree(part / "out", ignore_errors=True)
    command = children.python(str(Path(__file__)), "--child", str(part), bucket.name)
    output = children.run_child(command, {"PYTHONPATH": ":".join(sys.path)}).output
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return found


def _write_models(folder: Path) -> None:
    from tiny_models import write_tiny_text_encoders, write_tiny_vae

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        write_tiny_vae(folder)
        write_tiny_text_encoders(folder)


def _free_atom(number: int) -> bytes:
    """An MP4 box that players skip, with other bytes for each number."""
    return (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")


if __name__ == "__main__":
    main()
