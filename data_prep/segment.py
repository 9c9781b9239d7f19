"""`megatron-video data segment`: split each video at its cuts into clips, which are spans of frames of the file.

Cuts are found on content by PySceneDetect's AdaptiveDetector, fades to black by its ThresholdDetector; what is black
between two fades is dropped. The first and last frames of every scene are dropped (three, as in section 7 of arXiv
2502.10248: transitions smear over them). A scene that is longer than --max-seconds is split evenly. Nothing is
re-encoded unless --reencode says where to. Reading every frame also finds files that are damaged in the middle.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.reencode import reencoded
from data_prep.scenes import Scene, find_scenes, split_evenly
from data_prep.stage import StageReport, check_folder, execution_of, print_report, run_rows, stage_parser
from data_prep.workers import Execution
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, clip_id, dropped
from megatron_video.video_probe import frame_times

STAGE = "segment"
DROP_EDGE_FRAMES = 3
MIN_FRAMES = 17


@dataclass(frozen=True)
class SegmentSettings:
    """What the clips depend on, besides the videos."""

    min_frames: int = MIN_FRAMES
    """Shorter clips are dropped."""
    drop_edge_frames: int = DROP_EDGE_FRAMES
    """Dropped at both ends of every scene."""
    min_seconds: float = 0.0
    """Shorter clips are dropped."""
    max_seconds: float | None = None
    """Longer scenes are split evenly; None = never."""
    fades: bool = True
    """A fade to black ends a scene."""
    reencode: Path | None = None
    """Folder for a file of each clip's own; None = clips are spans."""

    def __post_init__(self) -> None:
        if self.min_frames < 1:
            raise UserError(f"--min-frames {self.min_frames} must be at least 1")
        if self.drop_edge_frames < 0:
            raise UserError(f"--drop-edge-frames {self.drop_edge_frames} must be at least 0")
        if not 0 <= self.min_seconds < math.inf:
            raise UserError(f"--min-seconds {self.min_seconds} must be at least 0, and finite")
        if self.max_seconds is not None and not self.max_seconds > max(self.min_seconds, 0):
            raise UserError(
                f"--max-seconds {self.max_seconds} must be above --min-seconds {self.min_seconds}; "
                "from twice that on, no piece of a split scene is too short"
            )


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, spread=True, check=_settings)
    parser.add_argument(
        "--min-frames", type=int, default=MIN_FRAMES, help="shorter clips are dropped (default: %(default)s)"
    )
    parser.add_argument(
        "--drop-edge-frames",
        type=int,
        default=DROP_EDGE_FRAMES,
        help="frames dropped at both ends of every scene (default: %(default)s)",
    )
    parser.add_argument("--min-seconds", type=float, default=0.0, help="shorter clips are dropped (default: 0)")
    parser.add_argument("--max-seconds", type=float, help="longer scenes are split evenly (default: never)")
    parser.add_argument("--no-fades", action="store_true", help="look for hard cuts only")
    parser.add_argument("--reencode", type=Path, metavar="FOLDER", help="write each clip as an H.264 file there")
    arguments = parser.parse_args(argv)
    report = run(arguments.source, arguments.out, execution_of(arguments), _settings(arguments))
    print_report(report, arguments.json)
    return 0


def run(
    manifest_in: Path,
    manifest_out: Path,
    workers: int | Execution = 1,
    settings: SegmentSettings = SegmentSettings(),
) -> StageReport:
    """One row a clip; a video gives as many as it has scenes, or pieces of them. Images pass.

    Raises:
        UserError: the folder for re-encoded clips cannot be written.
    """
    if settings.reencode:
        check_folder(settings.reencode, "--reencode")
    process = functools.partial(_segment_row, settings=settings)
    try:
        return run_rows(STAGE, manifest_in, manifest_out, process, asdict(settings), workers)
    except OSError as error:
        # Unreadable sources are dropped rows and do not come here.
        raise UserError(f"{error.filename or manifest_out.parent}: {error.strerror or error}") from error


def _settings(arguments: argparse.Namespace) -> SegmentSettings:
    return SegmentSettings(
        arguments.min_frames,
        arguments.drop_edge_frames,
        arguments.min_seconds,
        arguments.max_seconds,
        not arguments.no_fades,
        arguments.reencode.absolute() if arguments.reencode else None,
    )


def _segment_row(row: Row, settings: SegmentSettings) -> list[Row]:
    if row["is_image"]:
        return [row]
    span = row["start_frame"], row["end_frame"]
    scenes = find_scenes(row["source"], row["width"], row["height"], row["fps"], *span, fades=settings.fades)
    times = frame_times(row["source"])
    clips = (clip for scene in scenes for clip in _clips_of_scene(row, scene, times, settings))
    if settings.reencode is None:
        return list(clips)
    return [clip if clip["dropped_by"] else reencoded(clip, settings.reencode) for clip in clips]


def _clips_of_scene(row: Row, scene: Scene, times: np.ndarray, settings: SegmentSettings) -> Iterator[Row]:
    where = f"frames {scene.start} to {scene.end}"
    if scene.black:
        yield dropped(_clip(row, scene.start, scene.end, times), STAGE, f"black: {where} are faded out")
        return
    # Only at the ends of the scene: a border inside it is no transition. One that is shorter than both of its ends
    # becomes an empty span, not a negative one.
    start = min(scene.start + settings.drop_edge_frames, scene.end)
    end = max(scene.end - settings.drop_edge_frames, start)
    limit = settings.max_seconds
    spans = split_evenly(times, start, end, limit) if limit is not None and end > start else [(start, end)]
    for first, last in spans:
        clip = _clip(row, first, last, times)
        fault = _too_short(clip, settings)
        yield dropped(clip, STAGE, f"too short: {fault} between its ends ({where})") if fault else clip


def _too_short(clip: Row, settings: SegmentSettings) -> str | None:
    frames, seconds = clip["end_frame"] - clip["start_frame"], clip["end_time"] - clip["start_time"]
    if frames < settings.min_frames:
        return f"{frames} frames of {settings.min_frames}"
    # Half a millisecond: containers round the times of frames.
    return f"{seconds:.2f} s of {settings.min_seconds:.2f} s" if seconds < settings.min_seconds - 5e-4 else None


def _clip(row: Row, start: int, end: int, times: np.ndarray) -> Row:
    return {
        **row,
        "clip_id": clip_id(row["content_hash"], start, end),
        "start_frame": start,
        "end_frame": end,
        "start_time": float(times[start]),
        "end_time": float(times[end]),
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
