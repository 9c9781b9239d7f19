"""Tags of a few frames without a model: static share, flicker, text-like overlays, perceptual hash."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import imagehash
import numpy as np
from PIL import Image

STATIC_LONG_SIDE = 256
# Grey levels by which coding noise moves a pixel that shows the same; larger changes are seen as change.
STATIC_RANGE = 8
# Text is looked for at one size, so that strokes have the same width in every resolution.
_TEXT_LONG_SIDE = 640
_TEXT_CONTRAST = 48
_LETTER_GAP = 13
_LINE_HEIGHTS = (7, 96)
_LEAST_ASPECT = 1.6
_EDGE_SHARES = (0.25, 0.9)
# Along a row of pixels, how often a stroke begins per line height; a plain bar or border has hardly any.
_LEAST_STROKES_PER_HEIGHT = 0.6
_LEAST_JOINED_SHARE = 0.55


def static_share(frames: np.ndarray) -> float:
    """Share of pixels whose grey value stays within `STATIC_RANGE` levels over uint8 [T, H, W, 3], at 256 pixels long
    side: 1 for a still, 0 where all moves."""
    greys = np.stack([shrunk_grey(frame, STATIC_LONG_SIDE) for frame in frames])
    return float((np.ptp(greys, axis=0) <= STATIC_RANGE).mean())


def flicker(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over pairs of neighbouring frames, uint8 [H, W, 3], of the change of their mean grey value, 0 to 255."""
    means = [[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() for frame in pair] for pair in pairs]
    return float(np.mean([abs(after - before) for before, after in means]))


def text_area(frames: np.ndarray) -> float:
    """Share of the picture in text-like boxes that stay in place in at least half of uint8 [T, H, W, 3].

    Text-like is a row of strokes with strong edges, wider than high, where edges and gaps take turns. No model reads
    it: lattices and lettering in the scene that does not move count too, and text over rich texture may be missed.
    """
    masks = np.stack([_text_mask(shrunk_grey(frame, _TEXT_LONG_SIDE)) for frame in frames])
    return float((masks.mean(axis=0) >= 0.5).mean())


def perceptual_hash(frame: np.ndarray) -> str:
    """64-bit DCT hash of uint8 [H, W, 3] by ImageHash, 16 hex digits; near pictures differ in few bits."""
    return str(imagehash.phash(Image.fromarray(frame)))


def shrunk_grey(frame: np.ndarray, long_side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> grey uint8 with this long side; smaller pictures are not enlarged."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    factor = long_side / max(grey.shape)
    if factor >= 1:
        return grey
    size = (max(1, round(grey.shape[1] * factor)), max(1, round(grey.shape[0] * factor)))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def _text_mask(grey: np.ndarray) -> np.ndarray:
    """Boxes of text-like rows, bool [H, W]."""
    gradient = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))
    edges = (gradient > _TEXT_CONTRAST).astype(np.uint8)
    # Letters of a line grow together, lines above each other do not.
    joined = cv2.morphologyEx(edges, cv2.MORPH_CLOSE, np.ones((1, _LETTER_GAP), np.uint8))
    joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    mask = np.zeros(grey.shape, bool)
    for x, y, width, height, area in cv2.connectedComponentsWithStats(joined)[2][1:]:
        box = edges[y : y + height, x : x + width]
        if _is_text_like(box, width, height, area):
            mask[y : y + height, x : x + width] = True
    return mask


def _is_text_like(edges: np.ndarray, width: int, height: int, joined_area: int) -> bool:
    if not _LINE_HEIGHTS[0] <= height <= _LINE_HEIGHTS[1] or width < _LEAST_ASPECT * height:
        return False
    if joined_area < _LEAST_JOINED_SHARE * width * height or not _EDGE_SHARES[0] <= edges.mean() <= _EDGE_SHARES[1]:
        return False
    strokes = ((edges[:, 1:] > edges[:, :-1]).sum(axis=1)).mean()
    return bool(strokes * height / width >= _LEAST_STROKES_PER_HEIGHT)
