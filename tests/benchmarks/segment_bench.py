"""`data segment` against PySceneDetect's own command, on the same files: time, and whether the cuts are the same.

    python tests/benchmarks/segment_bench.py

Ours reads a manifest of all files in one command, with one worker; PySceneDetect's command takes one file, so it is
called once for each. Both at their defaults otherwise, but for the shortest scene (one frame, so that all cuts show)
and the frames that ours drops at cuts (none). `ours, hard cuts` leaves fades out, which the other does not look for.
The starts of Python and the imports are in the times; `one_frame_s` is what they take.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench_video
import children
import report

from data_prep import ingest
from megatron_video.manifest import kept_rows, read_manifest

COLUMNS = ["way", "frames", "wall_s", "cpu_s", "one_frame_s", "frames_per_s", "frames_per_cpu_s", "cuts"]
Figures = dict[str, float]
Scenes = dict[str, list[int]]
_EVERYTHING = ("--min-frames", "1", "--drop-edge-frames", "0", "--workers", "1")


def run_ours(folder: Path, options: Sequence[str]) -> Figures:
    """The stage over the manifest of `folder`."""
    # A new folder each time, else the stage would say that everything is done.
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    out = folder / "out" / "segmented.parquet"
    command = children.python("-m", "data_prep.cli", "segment", "--in", str(folder / "work" / "in.parquet"))
    return _figures([children.run_child([*command, "--out", str(out), *_EVERYTHING, *options])])


def run_theirs(folder: Path) -> Figures:
    """scenedetect detect-adaptive list-scenes, once a file."""
    scenedetect = str(Path(sys.executable).with_name("scenedetect"))
    commands = [
        [scenedetect, "-q", "-i", str(path), "-o", str(folder / "work"), "detect-adaptive", "-m", "1", "list-scenes"]
        for path in _videos(folder)
    ]
    return _figures([children.run_child(command) for command in commands])


def cuts_of_ours(folder: Path) -> Scenes:
    """First frames of all scenes by file, from the manifest."""
    found: Scenes = {}
    for row in kept_rows(read_manifest(folder / "out" / "segmented.parquet")):
        found.setdefault(Path(row["source"]).stem, []).append(row["start_frame"])
    return found


def cuts_of_theirs(folder: Path) -> Scenes:
    """First frames of all scenes by file, from the CSV files."""
    found = {}
    for path in _videos(folder):
        lines = list(csv.reader((folder / "work" / f"{path.stem}-Scenes.csv").read_text().splitlines()))
        header = next(number for number, line in enumerate(lines) if "Start Frame" in line)
        column = lines[header].index("Start Frame")
        # Theirs count from one.
        found[path.stem] = [int(line[column]) - 1 for line in lines[header + 1 :]]
    return found


WAYS: dict[str, Callable[[Path], Figures]] = {
    "ours": partial(run_ours, options=()),
    "ours, hard cuts": partial(run_ours, options=("--no-fades",)),
    "scenedetect": run_theirs,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files, time the commands, compare the cuts, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", choices=list(bench_video.ENCODERS), default=list(bench_video.ENCODERS))
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--scene-frames", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), help="rows and columns")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the videos here")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "segment.json")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(arguments, arguments.folder or Path(scratch))
    report.print_table(rows, COLUMNS)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "folder")}
    report.write(arguments.out, settings, rows, {"same_cuts": len({str(row["scenes"]) for row in rows}) == 1})


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a way."""
    long, short = folder / "long", folder / "one-frame"
    for part, frames in ((long, arguments.frames), (short, 1)):
        _prepare(part, arguments, frames)
    ways = {name: WAYS[name] for name in arguments.ways}
    # One frame a file: all that is not work on frames.
    start = children.in_turns({name: partial(way, short) for name, way in ways.items()}, 1)
    scenes: dict[str, Scenes] = {}
    runs = {name: partial(_run_and_read, name, way, long, scenes) for name, way in ways.items()}
    times = children.in_turns(runs, arguments.repeats)
    frames = arguments.frames * len(arguments.codecs)
    rows = []
    for name, figures in times.items():
        median = children.medians(figures)
        rates = {"frames_per_s": frames / median["wall_s"], "frames_per_cpu_s": frames / median["cpu_s"]}
        row = {"way": name, "frames": frames, "one_frame_s": start[name][0]["cpu_s"], **median, **rates}
        cuts = sum(len(starts) - 1 for starts in scenes[name].values())
        rows.append({**row, "cuts": cuts, "scenes": dict(sorted(scenes[name].items())), "repetitions": figures})
    return rows


def _run_and_read(name: str, way: Callable[[Path], Figures], folder: Path, scenes: dict[str, Scenes]) -> Figures:
    figures = way(folder)
    scenes[name] = cuts_of_theirs(folder) if name == "scenedetect" else cuts_of_ours(folder)
    return figures


def _prepare(folder: Path, arguments: argparse.Namespace, frames: int) -> None:
    height, width = arguments.size
    for codec in arguments.codecs:
        path = bench_video.video(folder / "raw", codec, frames, height, width, arguments.scene_frames)
        path.with_suffix(".txt").write_text("a caption")
    (folder / "work").mkdir(exist_ok=True)
    ingest.run(folder / "raw", folder / "work" / "in.parquet")


def _videos(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "raw").iterdir() if path.suffix in (".mp4", ".webm"))


def _figures(costs: Sequence[children.Cost]) -> Figures:
    return {
        "wall_s": sum(cost.wall_s for cost in costs),
        "cpu_s": sum(cost.cpu_s for cost in costs),
    }


if __name__ == "__main__":
    main()
