"""Scenes of a video: hard cuts by PySceneDetect's AdaptiveDetector, fades to black by its ThresholdDetector."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, pairwise

import cv2
import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode, ThresholdDetector

from megatron_video.video_io import iter_frames

# The detectors need no more detail, and the time goes with the pixels.
_DETECTION_WIDTH = 256
_FADE_OUT_LEVEL = 12


@dataclass(frozen=True)
class Scene:
    """Frames `start` to `end` (exclusive) between two cuts or fades."""

    start: int
    end: int
    black: bool = False
    """What lies between a fade-out and the next fade-in."""


def find_scenes(
    path: str, width: int, height: int, fps: float, start: int = 0, end: int | None = None, fades: bool = True
) -> list[Scene]:
    """Decode frames `start` to `end` (the last one if None) one by one and split them; the scenes cover all of them.

    Raises:
        VideoError: the file is damaged or cut short.
    """
    # NTSC rates are fractions over 1001.
    rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
    factor = min(1.0, _DETECTION_WIDTH / width)
    size = None if factor == 1 else (max(1, round(height * factor)), round(width * factor))
    # min_scene_len 1: a cut that is close to another must still end its clip; short clips are dropped afterwards.
    detector = AdaptiveDetector(min_scene_len=1)
    fading = _Fades() if fades else None
    cuts: list[int] = []
    number = start - 1
    for number, frame in enumerate(iter_frames(path, start, end, size=size, rough=True), start):
        # PySceneDetect works on OpenCV's colour order. A cut comes two frames late, but names its own frame.
        code, picture = FrameTimecode(number, rate), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        cuts += [cut.frame_num for cut in detector.process_frame(code, picture)]
        if fading:
            fading.process_frame(code, picture)
    black = fading.ranges(FrameTimecode(max(number, start), rate), start, number + 1) if fading else []
    return _scenes(cuts, black, start, number + 1)


def split_evenly(
    times: Sequence[float] | np.ndarray, start: int, end: int, max_seconds: float
) -> list[tuple[int, int]]:
    """Frames `start` to `end` in as few pieces as none lasts longer than `max_seconds`, all about equally long.

    Equal pieces rather than full ones and a rest: no part of a scene becomes too short to keep.

    Args:
        times: [T+1], ascending, seconds at which each frame is shown and the end of the last.
    """
    length = times[end] - times[start]
    for pieces in count(max(1, math.ceil(round(length / max_seconds, 6)))):
        targets = (times[start] + length * number / pieces for number in range(1, pieces))
        # The border that is nearest in time, which with a variable rate is not the nearest in frames.
        borders = [start, *(_nearest(times, target, start, end) for target in targets), end]
        spans = list(pairwise(sorted(set(borders))))
        if pieces >= end - start or all(times[b] - times[a] <= max_seconds + 1e-6 for a, b in spans):
            return spans
    raise AssertionError("unreachable: pieces of one frame end the loop")


class _Fades:
    """Stretches below PySceneDetect's fade level, each as a whole."""

    def __init__(self) -> None:
        # The bias says where in the dark stretch the detector puts its cut: at its beginning or at its end.
        self._detectors = [
            ThresholdDetector(_FADE_OUT_LEVEL, min_scene_len=1, fade_bias=bias, add_final_scene=bias < 0)
            for bias in (-1.0, 1.0)
        ]
        self._edges: tuple[list[int], list[int]] = ([], [])

    def process_frame(self, code: FrameTimecode, picture: np.ndarray) -> None:
        # All that the detector asks of a picture is its mean, and OpenCV's is the faster one.
        level = np.array(cv2.mean(picture)[:3])
        for detector, edges in zip(self._detectors, self._edges, strict=True):
            edges += [cut.frame_num for cut in detector.process_frame(code, level)]

    def ranges(self, last: FrameTimecode, start: int, end: int) -> list[tuple[int, int]]:
        """First dark frame and first bright one after it, of each stretch; a video that is all dark has none."""
        begins = [*self._edges[0], *(cut.frame_num for cut in self._detectors[0].post_process(last))]
        found = list(zip(begins, [*self._edges[1], end], strict=False))
        return [] if found == [(start, end)] else found


def _scenes(cuts: Sequence[int], black: Sequence[tuple[int, int]], start: int, end: int) -> list[Scene]:
    edges = {edge for stretch in black for edge in stretch}
    # Flicker inside the dark is no scene.
    seen = {cut for cut in cuts if not any(first < cut < last for first, last in black)}
    borders = [start, *sorted(edge for edge in seen | edges if start < edge < end), end]
    dark = set(black)
    return [Scene(a, b, (a, b) in dark) for a, b in pairwise(borders)]


def _nearest(times: Sequence[float] | np.ndarray, target: float, start: int, end: int) -> int:
    after = bisect_left(times, target, start, end)
    return after - 1 if after > start and target - times[after - 1] < times[after] - target else after
