"""Decode and resize a window of a 720p video to a bucket: `data encode`'s decoder against PyAV, decord and torchcodec.

    python tests/benchmarks/decode_bench.py

The others are used as their own pages show, with the scaled size and the centre crop of ours. decord and torchcodec
are no dependency: what cannot be imported is skipped by name. Each decoder has a process of its own, and they take
turns. `same_frames` says that each frame is nearer to ours of the same number than to its neighbours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bench_video
import children
import numpy as np
import report

from megatron_video.buckets import Bucket, parse_bucket

COLUMNS = ["codec", "first", "decoder", "frames_per_s", "frames_per_cpu_s", "difference", "same_frames", "status"]


@dataclass(frozen=True)
class Task:
    """Frames `first` on of a file, in a bucket."""

    path: str
    first: int
    bucket: Bucket
    height: int
    width: int
    """Of the file."""
    threads: int
    """0 leaves it to the library."""

    @property
    def last(self) -> int:
        return self.first + self.bucket.frames

    @property
    def scaled(self) -> tuple[int, int]:
        """Rows and columns that cover the bucket."""
        factor = max(self.bucket.height / self.height, self.bucket.width / self.width)
        return max(self.bucket.height, round(self.height * factor)), max(self.bucket.width, round(self.width * factor))

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """The centre of scaled frames, [T, H, W, 3]."""
        top, left = ((scaled - side) // 4 * 2 for scaled, side in zip(self.scaled, self.bucket[1:], strict=True))
        return np.ascontiguousarray(frames[:, top : top + self.bucket.height, left : left + self.bucket.width])


def ours(task: Task) -> np.ndarray:
    """The decoder of `data encode`."""
    from data_prep.decode import CpuDecoder

    row = {"source": task.path, "start_frame": task.first, "end_frame": task.last, "border_share": None}
    return np.asarray(CpuDecoder().decode(row, task.bucket).numpy())


def pyav(task: Task) -> np.ndarray:
    """From the first frame on, as PyAV's cookbook has it."""
    import av

    height, width = task.scaled
    frames = []
    with av.open(task.path) as container:
        if task.threads != 1:
            container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number >= task.first:
                frames.append(frame.reformat(width=width, height=height, format="rgb24").to_ndarray())
            if len(frames) == task.bucket.frames:
                break
    return task.cut(np.stack(frames))


def decord(task: Task) -> np.ndarray:
    """VideoReader with its own resizing, get_batch."""
    from decord import VideoReader, cpu

    height, width = task.scaled
    reader = VideoReader(task.path, ctx=cpu(0), width=width, height=height, num_threads=task.threads)
    return task.cut(reader.get_batch(range(task.first, task.last)).asnumpy())


def torchcodec(task: Task) -> np.ndarray:
    """VideoDecoder with its resizing transform, get_frames_in_range."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    decoder = VideoDecoder(
        task.path, dimension_order="NHWC", num_ffmpeg_threads=task.threads, transforms=[Resize(task.scaled)]
    )
    return task.cut(decoder.get_frames_in_range(task.first, task.last).data.numpy())


DECODERS: dict[str, Callable[[Task], np.ndarray]] = {
    "ours": ours,
    "pyav": pyav,
    "decord": decord,
    "torchcodec": torchcodec,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files, time every decoder, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", choices=list(bench_video.ENCODERS), default=list(bench_video.ENCODERS))
    parser.add_argument("--bucket", type=parse_bucket, default=parse_bucket("68x544x992"))
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), help="rows and columns of the files")
    parser.add_argument("--first", type=int, nargs="+", default=[0, 100], help="first frame of each window")
    parser.add_argument("--decoders", nargs="+", choices=list(DECODERS), default=list(DECODERS))
    parser.add_argument("--threads", type=int, default=1, help="of the decoder; 0: the library's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the videos here")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "decode.json")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch, processes(arguments.decoders) as workers:
        rows = [
            row
            for task, codec in _tasks(arguments, arguments.folder or Path(scratch))
            for row in compare(task, codec, workers, arguments.repeats)
        ]
    report.print_table(rows, COLUMNS)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "folder")}
    report.write(arguments.out, settings | {"bucket": arguments.bucket.name}, rows, {})


def compare(task: Task, codec: str, workers: dict[str, Connection], repeats: int) -> list[dict[str, Any]]:
    """One row a decoder."""
    # The first answers carry the frames; they also warm the file cache up.
    answers = {name: _ask(worker, task, True) for name, worker in workers.items()}
    working = {name: partial(_timed, workers[name], task) for name, answer in answers.items() if "frames" in answer}
    times = children.in_turns(working, repeats)
    reference = answers["ours"].get("frames") if "ours" in answers else None
    rows = []
    for name, answer in answers.items():
        row = {"codec": codec, "first": task.first, "decoder": name, "status": answer.get("error", "ok")}
        if name in times:
            median = children.medians(times[name])
            row |= {"frames_per_s": task.bucket.frames / median["wall_s"]}
            row |= {"frames_per_cpu_s": task.bucket.frames / median["cpu_s"], "repetitions": times[name]}
            row |= _difference(answer["frames"], reference) if reference is not None else {}
        rows.append(row)
    return rows


@contextmanager
def processes(names: Sequence[str]) -> Iterator[dict[str, Connection]]:
    """A process for each decoder."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    running = []
    for name in names:
        workers[name], theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        process.start()
        theirs.close()
        running.append(process)
    try:
        yield workers
    finally:
        for connection in workers.values():
            connection.close()
        for process in running:
            process.join()


def _tasks(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[Task, str]]:
    height, width = arguments.size
    for codec in arguments.codecs:
        frames = max(arguments.first) + arguments.bucket.frames
        path = bench_video.video(folder, codec, frames, height, width)
        for first in arguments.first:
            yield Task(str(path), first, arguments.bucket, height, width, arguments.threads), codec


def _serve(connection: Connection, name: str) -> None:
    while True:
        try:
            task, with_frames = connection.recv()
        except EOFError:
            return
        try:
            kept: list[np.ndarray] = []
            answer: dict[str, Any] = children.measured(partial(_decode_into, kept, name, task))
            connection.send(answer | ({"frames": kept[0]} if with_frames else {}))
        except Exception:
            # Not installed, or it cannot read the file: said in the table, and the others go on.
            connection.send({"error": traceback.format_exc().strip().splitlines()[-1][:120]})


def _decode_into(kept: list[np.ndarray], name: str, task: Task) -> None:
    kept.append(DECODERS[name](task))


def _ask(worker: Connection, task: Task, with_frames: bool) -> dict[str, Any]:
    worker.send((task, with_frames))
    answer: dict[str, Any] = worker.recv()
    return answer


def _timed(worker: Connection, task: Task) -> dict[str, float]:
    return _ask(worker, task, False)


def _difference(frames: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Mean absolute difference of 255, and whether these are the same frames."""
    apart = [_apart(frames, reference)]
    if len(frames) > 1:
        apart += [_apart(frames[1:], reference[:-1]), _apart(frames[:-1], reference[1:])]
    return {"difference": apart[0], "same_frames": apart[0] < min([*apart[1:], np.inf])}


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    # Frame by frame: all at once would be gigabytes.
    return float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(one, other, strict=True)]))


if __name__ == "__main__":
    main()
