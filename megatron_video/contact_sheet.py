"""Contact sheets: a PNG that shows a few frames of every video under its caption.

Captions are drawn with the font inside OpenCV 5, which covers Latin and Chinese, so no font need be installed; a
character that it lacks (an emoji) is drawn as a question mark.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from megatron_video.errors import UserError
from megatron_video.files import write_atomically

Image = npt.NDArray[np.uint8]

MARGIN = 8
GAP = 2
FONT_SIZE = 13
LINE_HEIGHT = 18
MAX_CAPTION_LINES = 2
BACKGROUND = 255
TEXT_COLOUR = (30, 30, 30)
# A sheet grows sideways to about this many pixels before it grows downwards.
TARGET_WIDTH = 1600
# Small videos are enlarged by a whole factor until a frame is about this high.
TARGET_FRAME_HEIGHT = 96


def write_contact_sheet(
    rows: Sequence[tuple[str, Image]],
    path: str | Path,
    columns: int = 6,
    scale: float | None = None,
    across: int | None = None,
) -> Path:
    """Write a PNG with one entry a video: its caption over `columns` frames, evenly spaced from first to last.

    Args:
        rows: (caption, frames uint8 [T, H, W, 3] in RGB); sizes and lengths may differ, and one frame is an image.
        path: the PNG; its folder is made, and an older file is replaced only when the new one is complete.
        columns: most frames shown of one video.
        scale: enlargement of the frames; None picks a whole factor that makes small videos visible.
        across: videos side by side; None: as many as make a wide picture.

    Raises:
        UserError: nothing to show, or frames that are not uint8 [T, H, W, 3].
    """
    path = Path(path)
    if not rows:
        raise UserError(f"contact sheet {path}: there are no videos to show")
    # Checked before anything is drawn, so that bad input leaves no half a picture.
    for caption, frames in rows:
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise UserError(
                f"contact sheet {path}: {caption!r} is {frames.dtype} {frames.shape}, not uint8 [T, H, W, 3]"
            )
    factor = scale or max(1, round(TARGET_FRAME_HEIGHT / min(frames.shape[1] for _, frames in rows)))
    strips = [_film_strip(frames, columns, factor) for _, frames in rows]
    width = max(strip.shape[1] for strip in strips)
    captions = [_wrap(caption, width) for caption, _ in rows]
    # Every entry has room for the longest caption, so that the grid stays aligned.
    text_height = LINE_HEIGHT * max(map(len, captions))
    entries = [_entry(lines, strip, width, text_height) for lines, strip in zip(captions, strips, strict=True)]
    _write_png(_grid(entries, across), path)
    return path


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` different indices into `count` frames, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, max(wanted, 1)))})


def _film_strip(frames: Image, columns: int, factor: float) -> Image:
    height, width = (round(side * factor) for side in frames.shape[1:3])
    # Nearest neighbour: the sheet shows the pixels that were made, not smoothed ones.
    method = cv2.INTER_NEAREST if factor >= 1 else cv2.INTER_AREA
    chosen = [cv2.resize(frames[i], (width, height), interpolation=method) for i in evenly_spaced(len(frames), columns)]
    spaced = [np.pad(frame, ((0, 0), (0, GAP), (0, 0)), constant_values=BACKGROUND) for frame in chosen]
    return np.concatenate(spaced, axis=1)[:, :-GAP]


def _entry(lines: Sequence[str], strip: Image, width: int, text_height: int) -> Image:
    canvas = np.full((text_height + strip.shape[0], width, 3), BACKGROUND, np.uint8)
    font = cv2.FontFace("sans")
    top = text_height - len(lines) * LINE_HEIGHT
    for number, line in enumerate(lines):
        baseline = (0, top + number * LINE_HEIGHT + FONT_SIZE)
        _, canvas = cv2.putText(canvas, line, baseline, TEXT_COLOUR, font, FONT_SIZE)
    canvas[text_height : text_height + strip.shape[0], : strip.shape[1]] = strip
    return canvas


def _wrap(caption: str, width: int) -> list[str]:
    """At most two lines that fit `width`; Chinese breaks anywhere, other text at a space where there is one."""
    rest = " ".join(caption.split())
    lines: list[str] = []
    while rest and len(lines) < MAX_CAPTION_LINES:
        last = len(lines) == MAX_CAPTION_LINES - 1
        line = rest if _text_width(rest) <= width else _longest_prefix(rest, width, ellipsis=last)
        lines.append(line.rstrip())
        rest = "" if last else rest[len(line) :].lstrip()
    return lines


def _longest_prefix(text: str, width: int, ellipsis: bool) -> str:
    tail = "..." if ellipsis else ""
    # Halving: captions of ten thousand characters would take seconds to try end by end.
    end = max(1, bisect_right(range(1, len(text)), width, key=lambda end: _text_width(text[:end] + tail)))
    space = text.rfind(" ", 0, end + 1)
    return text[: space if space > 0 else end] + tail


def _text_width(text: str) -> int:
    return int(cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace("sans"), FONT_SIZE)[2])


def _grid(entries: Sequence[Image], across: int | None) -> Image:
    width = max(entry.shape[1] for entry in entries) + MARGIN
    height = max(entry.shape[0] for entry in entries) + MARGIN
    across = min(len(entries), across or max(1, TARGET_WIDTH // width))
    down = math.ceil(len(entries) / across)
    sheet = np.full((down * height + MARGIN, across * width + MARGIN, 3), BACKGROUND, np.uint8)
    for number, entry in enumerate(entries):
        y, x = MARGIN + number // across * height, MARGIN + number % across * width
        sheet[y : y + entry.shape[0], x : x + entry.shape[1]] = entry
    return sheet


def _write_png(image: Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise UserError(f"contact sheet {path}: {image.shape[1]} x {image.shape[0]} pixels cannot be written as PNG")
    write_atomically(path, data.tobytes())
