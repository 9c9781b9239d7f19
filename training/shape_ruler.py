"""Does a video show the colour and the direction that its caption asks for? Decided from pixels alone.

The ruler knows nothing of any model: the foreground is what differs in chroma from the background, its colour is the
vote of its hues, its direction the optical flow inside it, summed over the video. A video without a coloured
foreground, or without motion, counts as wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# HSV hue in degrees. A hue belongs to the nearest of them.
COLOUR_HUES = {"red": 0.0, "yellow": 60.0, "green": 120.0, "blue": 240.0}
# Unit steps in image coordinates (x to the right, y downwards).
DIRECTION_VECTORS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
COLOUR_WORDS = {
    "red": r"\bred\b|红",
    "yellow": r"\byellow\b|黄",
    "green": r"\bgreen\b|绿",
    "blue": r"\bblue\b|蓝",
}
DIRECTION_WORDS = {
    "left": r"\bleft(wards?)?\b|[向往朝]左",
    "right": r"\bright(wards?)?\b|[向往朝]右",
    "up": r"\bup(wards?)?\b|[向往朝]上",
    "down": r"\bdown(wards?)?\b|[向往朝]下",
}

# Chroma distance (Lab units) from the background below which nothing counts as coloured.
MIN_CHROMA_DISTANCE = 12.0
# The core of the foreground: pixels above this share of the strongest chroma distance of the video.
CORE_SHARE = 0.5
# The foreground must fill at least this share of the picture, and at most that one to stand out from a background.
MIN_FOREGROUND_AREA = 0.004
MAX_FOREGROUND_AREA = 0.6
# Net motion over the whole video, in shares of the picture's side, below which it stands still.
MIN_MOTION = 0.04
# Optical flow needs some pixels to work on; smaller frames are enlarged to about this side.
FLOW_SIDE = 96


@dataclass(frozen=True)
class Request:
    """What a caption asks for; None where it names none, or more than one."""

    colour: str | None
    direction: str | None


@dataclass(frozen=True)
class Observation:
    """What a video shows. `flow` and `track` are net displacements (x, y) in shares of the picture's width, height."""

    colour: str | None
    direction: str | None
    foreground_area: float
    flow: tuple[float, float]
    track: tuple[float, float]


def parse_caption(caption: str) -> Request:
    """The colour and direction named in an English or Chinese caption."""
    return Request(_only_match(caption, COLOUR_WORDS), _only_match(caption, DIRECTION_WORDS))


def observe(frames: npt.NDArray[np.uint8]) -> Observation:
    """Colour and direction of the one moving shape in `frames` (uint8 [T, H, W, 3], RGB)."""
    smooth = np.stack([cv2.GaussianBlur(frame, (0, 0), max(frame.shape[:2]) / 64) for frame in frames])
    distance = _chroma_distance(smooth)
    core = distance > max(MIN_CHROMA_DISTANCE, CORE_SHARE * float(np.percentile(distance, 99.5)))
    area = float(core.mean())
    if not MIN_FOREGROUND_AREA <= area <= MAX_FOREGROUND_AREA:
        return Observation(None, None, area, (0.0, 0.0), (0.0, 0.0))
    flow = _net_flow(distance, core)
    return Observation(_dominant_colour(smooth, core), _direction(flow), area, flow, _net_track(distance * core))


def _only_match(caption: str, patterns: dict[str, str]) -> str | None:
    found = [name for name, pattern in patterns.items() if re.search(pattern, caption, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None


def _chroma_distance(frames: npt.NDArray[np.uint8]) -> FloatArray:
    """Distance [T, H, W] of every pixel from the background in Lab's colour plane, blind to light and shadow."""
    lab = np.stack([cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2Lab) for frame in frames])
    chroma = lab[..., 1:]
    # The median is the background as long as the shape fills less than half of the picture.
    background = np.median(chroma, axis=(0, 1, 2))
    return np.linalg.norm(chroma - background, axis=-1).astype(np.float32)


def _dominant_colour(frames: npt.NDArray[np.uint8], core: npt.NDArray[np.bool_]) -> str:
    pixels = frames[core].astype(np.float32)
    hue = cv2.cvtColor(pixels[None] / 255, cv2.COLOR_RGB2HSV)[0, :, 0]
    anchors = np.array(list(COLOUR_HUES.values()), np.float32)
    nearest = np.abs((hue[:, None] - anchors + 180) % 360 - 180).argmin(1)
    strength = pixels.max(1) - pixels.min(1)
    votes = np.bincount(nearest, weights=strength, minlength=len(anchors))
    return list(COLOUR_HUES)[int(votes.argmax())]


def _net_flow(distance: FloatArray, core: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Sum over time of the mean Farneback flow of the foreground, in shares of width and height."""
    height, width = distance.shape[1:]
    factor = max(1, round(FLOW_SIDE / min(height, width)))
    size = (width * factor, height * factor)
    level = 255 / max(float(distance.max()), 1e-6)
    images = [cv2.resize((d * level).astype(np.uint8), size, interpolation=cv2.INTER_CUBIC) for d in distance]
    masks = [cv2.resize(c.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0 for c in core]
    flow = cv2.FarnebackOpticalFlow.create(numLevels=3, winSize=21, numIters=3, polyN=7, polySigma=1.5)
    total = np.zeros(2)
    for number in range(len(images) - 1):
        mask = masks[number] | masks[number + 1]
        if mask.any():
            field = flow.calc(images[number], images[number + 1], np.zeros((*mask.shape, 2), np.float32))
            total += field[mask].mean(0)
    return float(total[0] / size[0]), float(total[1] / size[1])


def _net_track(weight: FloatArray) -> tuple[float, float]:
    """How far the foreground's centre moves: slope of a straight line through its positions, times the duration."""
    mass = weight.sum((1, 2))
    seen = np.flatnonzero(mass > 0)
    if len(seen) < 2:
        return 0.0, 0.0
    height, width = weight.shape[1:]
    x = (weight[seen].sum(1) * np.arange(width)).sum(1) / mass[seen] / width
    y = (weight[seen].sum(2) * np.arange(height)).sum(1) / mass[seen] / height
    duration = len(weight) - 1
    return float(np.polyfit(seen, x, 1)[0] * duration), float(np.polyfit(seen, y, 1)[0] * duration)


def _direction(flow: tuple[float, float]) -> str | None:
    if np.hypot(*flow) < MIN_MOTION:
        return None
    return max(DIRECTION_VECTORS, key=lambda name: float(np.dot(DIRECTION_VECTORS[name], flow)))
