"""What a video or image file is, from its header, its packets and its first frame."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorTrc
from av.video.stream import VideoStream

from megatron_video.tone_mapping import HDR_TRANSFERS
from megatron_video.video_file import (
    FrameTable,
    VideoError,
    frame_seconds,
    frame_table,
    is_image,
    load_image,
    open_video,
    promised_frames,
)

# Demuxers round times to their units; cameras deviate by less than this from a constant rate.
_STEADY_SECONDS = 0.002
# A stream may end this much before the time in its header and be whole.
_SLACK_SECONDS = 0.1


@dataclass(frozen=True)
class VideoInfo:
    """What the container says of a file and what its packets show."""

    path: str
    codec: str
    """libav's decoder name, such as "h264" or "png"."""
    fps: float
    """Average frames per second; 0 for an image."""
    variable_fps: bool
    """The times between frames differ by more than rounding."""
    num_frames: int
    """Frames that are shown."""
    duration: float
    """Seconds, by the frames' times."""
    width: int
    """Pixels, after rotation."""
    height: int
    """Pixels, after rotation."""
    rotation: int
    """Degrees counter-clockwise (0, 90, 180, 270) by which a viewer turns the coded picture."""
    pixel_format: str
    color_transfer: str | None
    """Transfer characteristics, libav's name; None if the file does not say."""
    hdr: bool
    """They are PQ or HLG; readers map the tones to SDR."""
    audio: bool
    title: str | None
    """The title in the file's metadata."""
    is_image: bool


def probe(path: str | Path) -> VideoInfo:
    """Read the header, walk the packets, decode the first frame.

    Raises:
        VideoError: no such file, not a video or image, no video stream, or fewer frames than the header promises.
    """
    with open_video(path) as (container, stream):
        if is_image(container):
            return _probe_image(path, stream)
        promised = promised_frames(container, stream)
        table = frame_table(path)
        if promised > table.num_packets:
            raise VideoError(f"{path}: cut short: the header promises {promised} frames, {table.num_packets} are there")
        told, there = _promised_seconds(stream), _last_second(table)
        if told - there > _SLACK_SECONDS + 2 * _longest_gap(table):
            raise VideoError(f"{path}: cut short: the header promises {told:.2f} s, {there:.2f} s are there")
        return _probe_video(path, container, stream, table)


def frame_times(path: str | Path) -> np.ndarray:
    """float64 [T+1]: seconds at which each frame is shown, counted from the first, and the end of the last.

    Raises:
        VideoError: unreadable or damaged.
    """
    table = frame_table(path)
    with open_video(path) as (_, stream):
        return frame_seconds(table, frame_rate(stream, table))


def frame_rate(stream: VideoStream, table: FrameTable) -> Fraction:
    """Average frames per second: the rate that the container gives if the frames' times agree, else theirs."""
    told = [Fraction(rate.numerator, rate.denominator) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if not table.timed or table.num_frames < 2:
        return told[0] if told else Fraction(25)
    span, gaps = int(table.times[-1] - table.times[0]) * table.time_base, table.num_frames - 1
    # Rates such as 30000/1001 are exact in the header only; an edit list can make it wrong.
    fitting = (rate for rate in told if abs(gaps / rate - span) <= max(2 * table.time_base, span / 1000))
    return next(fitting, (gaps / span).limit_denominator(100_000))


def is_variable_rate(table: FrameTable) -> bool:
    """Some frame is shown for a time that differs from the average by more than rounding."""
    if not table.timed or table.num_frames < 3:
        return False
    gaps = np.diff(table.times)
    return bool(np.abs(gaps - gaps.mean()).max() > max(1.0, _STEADY_SECONDS / float(table.time_base)))


def _probe_video(path: str | Path, container: InputContainer, stream: VideoStream, table: FrameTable) -> VideoInfo:
    first = next(container.decode(stream), None)
    if first is None:
        raise VideoError(f"{path}: no frame can be decoded")
    rotation = int(first.rotation) % 360
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    rate = frame_rate(stream, table)
    return VideoInfo(
        path=str(path),
        codec=stream.codec_context.codec.name,
        fps=float(rate),
        variable_fps=is_variable_rate(table),
        num_frames=table.num_frames,
        duration=float(frame_seconds(table, rate)[-1]),
        width=width,
        height=height,
        rotation=rotation,
        pixel_format=first.format.name,
        color_transfer=_transfer_name(int(first.color_trc)),
        hdr=int(first.color_trc) in HDR_TRANSFERS,
        audio=bool(container.streams.audio),
        title=container.metadata.get("title"),
        is_image=False,
    )


def _promised_seconds(stream: VideoStream) -> float:
    """Until when the stream lasts, by the tag that Matroska and WebM have in place of a frame count; 0 without it."""
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _last_second(table: FrameTable) -> float:
    return int(table.times[-1]) * float(table.time_base) if table.timed else float("inf")


def _longest_gap(table: FrameTable) -> float:
    return int(np.diff(table.times).max()) * float(table.time_base) if table.num_frames > 1 else 0.0


def _transfer_name(value: int) -> str | None:
    known = value in ColorTrc.__members__.values() and value != ColorTrc.UNSPECIFIED
    return ColorTrc(value).name.lower().replace("_", "-") if known else None


def _probe_image(path: str | Path, stream: VideoStream) -> VideoInfo:
    height, width = load_image(path).shape[:2]
    return VideoInfo(
        path=str(path),
        codec=stream.codec_context.codec.name,
        fps=0.0,
        variable_fps=False,
        num_frames=1,
        duration=0.0,
        width=width,
        height=height,
        rotation=0,
        pixel_format=stream.codec_context.pix_fmt or "",
        color_transfer=None,
        hdr=False,
        audio=False,
        title=None,
        is_image=True,
    )
