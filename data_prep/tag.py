"""`megatron-video data tag`: figures about each clip, from 8 frames spread evenly over it.

Black borders (as the box inside them), resolution, blur, HSV saturation and brightness, static share, text-like
overlays and a perceptual hash; motion by optical flow and flicker between each of the frames and its successor. All
but the borders are measured inside the box. With --models also what networks say: data_prep/model_tags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data_prep.frame_tags import flicker, perceptual_hash, shrunk_grey, static_share, text_area
from data_prep.stage import StageReport, execution_of, print_report, run_rows, stage_parser
from data_prep.workers import Execution
from megatron_video.buckets import CropBox
from megatron_video.cli import run_command
from megatron_video.manifest import Row
from megatron_video.video_io import read_frames

STAGE = "tag"
NUM_FRAMES = 8
FLOW_LONG_SIDE = 256
# A line is border if 99 % of its pixels stay at or below this grey value in all frames; codecs leave black at 0 to 4,
# and ring by a little more beside an edge.
BORDER_GREY = 20
_BORDER_PERCENTILE = 99
_FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, spread=True, check=_check_models, gpu=lambda arguments: arguments.models)
    parser.add_argument("--models", type=Path, metavar="YAML", help="local weights of the model tags")
    arguments = parser.parse_args(argv)
    report = run(arguments.source, arguments.out, execution_of(arguments), arguments.models)
    print_report(report, arguments.json)
    return 0


def run(manifest_in: Path, manifest_out: Path, workers: int | Execution = 1, models: Path | None = None) -> StageReport:
    """Fill the tag columns of every kept row; with `models`, a YAML, also those of the networks that it names.

    Raises:
        UserError: a file of a model is missing or wrong.
    """
    if models is None:
        return run_rows(STAGE, manifest_in, manifest_out, _tag_row, {}, workers)
    # Imported only now: torch and transformers take seconds in every worker.
    from data_prep.model_tagging import run_with_models

    return run_with_models(manifest_in, manifest_out, workers, models)


def _check_models(arguments: argparse.Namespace) -> None:
    if arguments.models:
        from data_prep.model_tags import check_files, load_models_config

        check_files(load_models_config(arguments.models))


def sampled_frames(start: int, end: int, count: int = NUM_FRAMES) -> list[int]:
    """Up to `count` frame numbers, evenly from `start` to the last that has a successor before `end`."""
    # Short clips give fewer frames, not the same one twice.
    last = max(end - 2, start)
    return sorted({round(number) for number in np.linspace(start, last, count)})


def crop_box(frames: np.ndarray) -> CropBox:
    """The part inside black borders, of uint8 [T, H, W, 3]; even numbers (4:2:0 video). All black: all of it."""
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    height, width = grey.shape[1:]
    # The brightest frame decides: a dark scene is no border, what never lights up is.
    top, bottom = _bright_range(np.percentile(grey, _BORDER_PERCENTILE, axis=2).max(axis=0))
    left, right = _bright_range(np.percentile(grey, _BORDER_PERCENTILE, axis=1).max(axis=0))
    # Inwards to even numbers: half a border pixel less is better than one more.
    top, left, bottom, right = top + top % 2, left + left % 2, bottom - bottom % 2, right - right % 2
    if bottom - top < 2 or right - left < 2:
        return CropBox(0, 0, width, height)
    return CropBox(left, top, right - left, bottom - top)


def blur(frames: np.ndarray) -> float:
    """Variance of the Laplacian of grey values 0 to 255, mean over uint8 [T, H, W, 3]."""
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    return float(np.mean([cv2.Laplacian(grey, cv2.CV_64F).var() for grey in greys]))


def saturation_and_brightness(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per frame means of HSV saturation and value, 0 to 255, float64 [T] each."""
    means = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).mean(axis=(0, 1)) for frame in frames])
    return means[:, 1], means[:, 2]


def motion(first: np.ndarray, second: np.ndarray) -> float:
    """Mean length of Farneback's flow between two uint8 [H, W, 3], in pixels of a picture of 256 on the long side.

    Larger pictures are shrunk to that; smaller ones are not enlarged, their flow is.
    """
    before, after = (shrunk_grey(frame, FLOW_LONG_SIDE) for frame in (first, second))
    flow = cv2.calcOpticalFlowFarneback(before, after, None, **_FARNEBACK)  # type: ignore[call-overload]
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) * FLOW_LONG_SIDE / max(before.shape)


def tag_clip(row: Row) -> tuple[Row, np.ndarray]:
    """A row with the tags that need no model, and its sampled frames inside the borders, uint8 [T, H, W, 3].

    Raises:
        VideoError: the frames cannot be read.
    """
    # Each sampled frame with its successor, decoded in one pass.
    numbers = [0] if row["is_image"] else sampled_frames(row["start_frame"], row["end_frame"])
    wanted = sorted({*numbers, *(n + 1 for n in numbers if n + 1 < row["end_frame"])})
    frames = dict(zip(wanted, read_frames(row["source"], indices=wanted), strict=True))
    box = crop_box(np.stack([frames[number] for number in numbers]))
    inside = {number: _crop(frame, box) for number, frame in frames.items()}
    sampled = np.stack([inside[number] for number in numbers])
    row = {**row, **_box_tags(box, row), **_picture_tags(sampled)}
    if not row["is_image"]:
        row |= _change_tags(sampled, [(inside[n], inside[n + 1]) for n in numbers if n + 1 in inside])
    return row, sampled


def _tag_row(row: Row) -> list[Row]:
    return [tag_clip(row)[0]]


def _box_tags(box: CropBox, row: Row) -> Row:
    share = 1 - box.width * box.height / (row["width"] * row["height"])
    return {
        "crop_x": box.x,
        "crop_y": box.y,
        "crop_width": box.width,
        "crop_height": box.height,
        "border_share": share,
        "short_side": min(box.width, box.height),
    }


def _picture_tags(frames: np.ndarray) -> Row:
    saturation, brightness = saturation_and_brightness(frames)
    return {
        "blur": blur(frames),
        "brightness": float(brightness.mean()),
        **_spread("saturation", saturation),
        "text_area": text_area(frames),
        "phash": perceptual_hash(frames[len(frames) // 2]),
    }


def _change_tags(frames: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Row:
    # A clip of one frame has no pairs: nothing moves in it.
    lengths = [motion(before, after) for before, after in pairs] or [0.0]
    return {
        **_spread("motion", np.asarray(lengths)),
        "static_share": static_share(frames),
        "flicker": flicker(pairs) if pairs else 0.0,
    }


def _spread(name: str, values: np.ndarray) -> Row:
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_max": float(values.max()),
        f"{name}_min": float(values.min()),
    }


def _crop(frame: np.ndarray, box: CropBox) -> np.ndarray:
    return np.ascontiguousarray(frame[box.y : box.y + box.height, box.x : box.x + box.width])


def _bright_range(levels: np.ndarray) -> tuple[int, int]:
    bright = np.flatnonzero(levels > BORDER_GREY)
    return (int(bright[0]), int(bright[-1]) + 1) if len(bright) else (0, 0)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
