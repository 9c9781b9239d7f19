"""Videos for the benchmarks of the data stages, made with PyAV: panned textures with film grain and hard cuts."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

FPS = 24
# As uploaders have them: default group lengths, quality and speed that most pipelines use.
ENCODERS = {
    "h264": ("libx264", ".mp4", {"crf": "20", "preset": "veryfast", "g": "48"}),
    "vp9": ("libvpx-vp9", ".webm", {"crf": "28", "b": "0", "cpu-used": "8", "deadline": "realtime", "g": "48"}),
}
_PAN = 3  # pixels a frame: one frame is never taken for its neighbour
_GRAIN = 6
_BT709 = 1


def video(folder: Path, codec: str, frames: int, height: int, width: int, scene_frames: int = 60) -> Path:
    """A file of that codec, made unless it is there; a cut every `scene_frames` frames."""
    encoder, suffix, options = ENCODERS[codec]
    path = folder / f"{codec}-{frames}x{height}x{width}-{scene_frames}{suffix}"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    with av.open(str(partial), "w") as output:
        stream: Any = output.add_stream(encoder, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # Stated, so that every decoder knows the colour matrix.
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = (_BT709,) * 4
        for number, picture in enumerate(_pictures(frames, height, width, scene_frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709"
            )
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    partial.rename(path)
    return path


def _pictures(frames: int, height: int, width: int, scene_frames: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    grain = rng.integers(-_GRAIN, _GRAIN + 1, (height + 64, width + 64, 1), np.int16)
    for first in range(0, frames, scene_frames):
        wide = _texture(rng, height, width + _PAN * scene_frames)
        for number in range(min(scene_frames, frames - first)):
            y, x = rng.integers(0, 64, 2)
            shown = wide[:, _PAN * number : _PAN * number + width] + grain[y : y + height, x : x + width]
            yield np.clip(shown, 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coarse and fine detail over one colour of the scene's own, int16 [H, W, 3]."""
    picture = np.zeros((height, width, 3), np.float32)
    for cell, weight in ((64, 60), (8, 40)):
        coarse = rng.uniform(0, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        picture += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (picture + rng.uniform(10, 150, 3)).astype(np.int16)
