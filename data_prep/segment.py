"""`megatron-video data segment`: split each video at its cuts into clips, which are spans of frames of the file.

Cuts are found on content by PySceneDetect's AdaptiveDetector. The first and last frames of every clip are dropped
(three, as in section 7 of arXiv 2502.10248: transitions smear over them); nothing is re-encoded. Reading every frame
also finds files that are damaged in the middle.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode

from data_prep.stage import StageReport, print_report, run_rows, stage_parser
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, clip_id, dropped
from megatron_video.video_io import iter_frames

STAGE = "segment"
DROP_EDGE_FRAMES = 3
MIN_FRAMES = 17
# The detector needs no more detail, and the time goes with the pixels.
_DETECTION_WIDTH = 256


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__)
    parser.add_argument("--min-frames", type=int, default=MIN_FRAMES, help="shorter clips are dropped")
    parser.add_argument(
        "--drop-edge-frames", type=int, default=DROP_EDGE_FRAMES, help="frames dropped at both ends of every clip"
    )
    arguments = parser.parse_args(argv)
    report = run(
        arguments.source, arguments.out, arguments.min_frames, arguments.drop_edge_frames, workers=arguments.workers
    )
    print_report(report, arguments.json)
    return 0


def run(
    manifest_in: Path,
    manifest_out: Path,
    min_frames: int = MIN_FRAMES,
    drop_edge_frames: int = DROP_EDGE_FRAMES,
    workers: int = 1,
) -> StageReport:
    """One row a clip; a video gives as many as it has scenes. Images pass."""
    if min_frames < 1 or drop_edge_frames < 0:
        raise UserError(
            f"--min-frames {min_frames} must be at least 1, --drop-edge-frames {drop_edge_frames} at least 0"
        )
    settings = {"min_frames": min_frames, "drop_edge_frames": drop_edge_frames}
    process = functools.partial(_segment_row, min_frames=min_frames, drop_edge_frames=drop_edge_frames)
    return run_rows(STAGE, manifest_in, manifest_out, process, settings, workers)


def find_cuts(path: str, width: int, height: int, fps: float) -> tuple[list[int], int]:
    """Numbers of the frames that start a new scene (0 is not among them), and the number of frames read.

    Raises:
        VideoError: the file is damaged or cut short.
    """
    # min_scene_len 1: a cut that is close to another must still end its clip; short clips are dropped afterwards.
    detector = AdaptiveDetector(min_scene_len=1)
    # NTSC rates are fractions over 1001.
    rate = Fraction(fps).limit_denominator(1001)
    factor = min(1.0, _DETECTION_WIDTH / width)
    size = None if factor == 1 else (round(height * factor), round(width * factor))
    cuts: list[int] = []
    number = -1
    for number, frame in enumerate(iter_frames(path, size=size)):
        # PySceneDetect works on OpenCV's colour order. A cut comes two frames late, but names its own frame.
        found = detector.process_frame(FrameTimecode(number, rate), np.ascontiguousarray(frame[..., ::-1]))
        cuts += [cut.frame_num for cut in found]
    return sorted(set(cuts) - {0}), number + 1


def _segment_row(row: Row, min_frames: int, drop_edge_frames: int) -> list[Row]:
    if row["is_image"]:
        return [row]
    cuts, num_frames = find_cuts(row["source"], row["width"], row["height"], row["fps"])
    clips = []
    for start, end in pairwise([0, *cuts, num_frames]):
        # A scene shorter than both edges becomes an empty span, not a negative one.
        clip = _span(row, start + drop_edge_frames, max(end - drop_edge_frames, start + drop_edge_frames))
        length = clip["end_frame"] - clip["start_frame"]
        reason = f"too short: {length} frames of {min_frames} between its ends (frames {start} to {end})"
        clips.append(clip if length >= min_frames else dropped(clip, STAGE, reason))
    return clips


def _span(row: Row, start: int, end: int) -> Row:
    return {
        **row,
        "clip_id": clip_id(row["content_hash"], start, end),
        "start_frame": start,
        "end_frame": end,
        "start_time": start / row["fps"],
        "end_time": end / row["fps"],
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
