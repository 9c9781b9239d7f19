"""Files such as the field brings them: many codecs and containers, and all ways of being broken. Made with PyAV.

Every frame of a scene tells its number: the lower right corner is a grey patch of level 16 + number (numbers to 223).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

PATCH = 24
FPS = 24
_TINTS = np.array([(1, 0.3, 0.3), (0.3, 1, 0.3), (0.3, 0.3, 1), (1, 1, 0.3), (0.9, 0.9, 0.9)])


@dataclass(frozen=True)
class Codec:
    """An encoder with settings that make seeking hard: long groups of pictures, open ones where there are such."""

    encoder: str
    suffix: str
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)


_X265 = "pools=none:frame-threads=1:log-level=none:keyint=96:min-keyint=40:open-gop=1:bframes=4:crf=10"
CODECS: dict[str, Codec] = {
    "h264": Codec("libx264", ".mp4", options={"g": "250", "bf": "3", "threads": "1"}),
    "h264-open-gop": Codec("libx264", ".mkv", options={"x264-params": "keyint=48:open-gop=1:bframes=4:threads=1"}),
    "hevc": Codec("libx265", ".mp4", options={"x265-params": _X265, "tag": "hvc1", "preset": "fast"}),
    "hevc-10-bit": Codec("libx265", ".mkv", "yuv420p10le", {"x265-params": _X265, "preset": "fast"}),
    "vp9": Codec("libvpx-vp9", ".webm", options={"g": "250", "cpu-used": "5", "lag-in-frames": "16", "b": "2M"}),
    "av1": Codec("libsvtav1", ".mp4", options={"g": "200", "preset": "10", "svtav1-params": "lp=1", "crf": "20"}),
    "mpeg4": Codec("mpeg4", ".avi", options={"g": "100", "bf": "2", "q": "2", "flags": "+qscale"}),
    "mpeg-ts": Codec("libx264", ".ts", options={"g": "100", "bf": "2", "threads": "1"}),
    "prores": Codec("prores_ks", ".mov", "yuv422p10le"),
    "ffv1": Codec("ffv1", ".mkv", "yuv444p"),
    "mjpeg": Codec("mjpeg", ".avi", "yuvj420p", {"q": "2", "flags": "+qscale"}),
}


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture, float32 [H, W, 3], 40 to 200."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (-(-height // 8) + 1, -(-width // 8) + 1, 3)).astype(np.float32)
    return 40 + 160 * np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def scenes(lengths: Sequence[int], height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Scenes of slowly panned textures with hard cuts between them, uint8 [sum of lengths, H, W, 3], numbered."""
    parts = []
    for number, length in enumerate(lengths):
        wide = texture(seed * 100 + number, height, width + length) * _TINTS[(seed + number) % len(_TINTS)]
        parts.append(np.stack([wide[:, t : t + width] for t in range(length)]))
    return numbered(np.concatenate(parts).astype(np.uint8))


def numbered(frames: np.ndarray) -> np.ndarray:
    """The frames with the patch that tells their numbers."""
    marked = frames.copy()
    marked[:, -PATCH:, -PATCH:] = (16 + np.arange(len(frames)) % 224)[:, None, None, None]
    return marked


def numbers_of(frames: np.ndarray) -> list[int]:
    """Numbers of uint8 [T, H, W, 3], read from the patch."""
    return [round(float(frame[-PATCH + 4 : -4, -PATCH + 4 : -4].mean())) - 16 for frame in frames]


def faded(frames: np.ndarray, start: int, black: int, end: int, ramp: int) -> np.ndarray:
    """Fade to black from `start - ramp` to `start`, hold to `start + black`, fade in up to `end`."""
    level = np.ones(len(frames), np.float32)
    level[start - ramp : start] = np.linspace(1, 0, ramp, endpoint=False)
    level[start : start + black] = 0
    level[start + black : end] = np.linspace(0, 1, end - start - black, endpoint=False)
    return (frames * level[:, None, None, None]).astype(np.uint8)


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: Codec | None = None,
    *,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    audio: bool = False,
    hdr: bool = False,
    title: str | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Encode uint8 [T, H, W, 3] at 24 frames per second, or with frame t shown at `times[t]` / 24 seconds."""
    codec = codec or CODECS["h264"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as output:
        if title:
            output.metadata["title"] = title
        stream = output.add_stream(codec.encoder, rate=FPS, options=codec.options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = codec.pixel_format
        if hdr:
            stream.codec_context.color_trc, stream.codec_context.color_primaries = 16, 9
        if rotation:
            stream.set_display_rotation(rotation)
        sound = output.add_stream("aac", rate=48000) if audio else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, FPS)
            if hdr:
                frame.color_trc, frame.color_primaries = 16, 9
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if sound is not None:
            _add_tone(output, sound, len(frames) / FPS)
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """A file without pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        _add_tone(output, output.add_stream("aac", rate=48000), seconds)
    return path


def write_gif(path: Path, frames: np.ndarray) -> Path:
    """An animation of 10 frames per second."""
    pictures = [Image.fromarray(frame) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


def cut_short(source: Path, path: Path, share: float) -> Path:
    """The first part of a file's bytes, as an interrupted copy leaves it."""
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def trimmed_copy(source: Path, path: Path, seconds: float, lead: float) -> Path:
    """What `ffmpeg -ss SECONDS -c copy` writes: it begins `lead` seconds before, and an edit list hides that."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy, shift = new.add_stream_from_template(stream), int(seconds / stream.time_base)
        for packet in old.demux(stream):
            if packet.size and packet.pts >= int((seconds - lead) / stream.time_base):
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return path


def _add_tone(output: Any, stream: Any, seconds: float) -> None:
    wave = np.sin(np.arange(int(48000 * seconds)) * 0.05).astype(np.float32) * 0.2
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 48000, 0
    output.mux(stream.encode(frame))
    output.mux(stream.encode())
