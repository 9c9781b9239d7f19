"""Opening video files, and the table of the frames that a file holds, by its packets.

The table gives every frame its exact number, also with a variable frame rate, reordered frames (B, open GOP) and edit
lists, without decoding. It is a few bytes a frame, so hours of video fit; packets themselves are never kept.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from megatron_video.errors import UserError

_NO_TIME = np.iinfo(np.int64).min
# AVIF and HEIC, stills and animations, which libav takes for MP4.
_PICTURE_BRANDS = ("avif", "avis", "heic", "heix", "heim", "heis", "mif1", "msf1")


class VideoError(UserError):
    """One file cannot be read or written; stages turn it into a dropped row."""


@dataclass(frozen=True)
class FrameTable:
    """The frames that a viewer is shown, in the order of showing."""

    times: np.ndarray
    """int64 [T] in units of `time_base`; in the order of the file if not `timed`."""
    keyframes: np.ndarray
    """int64 [K], numbers of the frames at which decoding can start, ascending."""
    time_base: Fraction
    """Seconds."""
    timed: bool
    """Every frame has a time of its own. Raw streams and many AVI files have none."""
    num_packets: int
    """Frames in the file, with those that an edit list hides."""

    @property
    def num_frames(self) -> int:
        """Frames shown."""
        return len(self.times)

    def number_of(self, time: int | None) -> int | None:
        """Number of the frame that is shown at `time`; None if there is none."""
        if time is None:
            return None
        number = int(np.searchsorted(self.times, time))
        return number if number < len(self.times) and self.times[number] == time else None


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open for decoding; libav's errors of the whole `with` block become `VideoError`s naming the file."""
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    if not os.path.getsize(path):
        raise VideoError(f"{path}: the file is empty (0 bytes)")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            # The cover picture of a sound file is a video stream to libav.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{path}: no video stream in it")
            yield container, streams[0]
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be read: {error.strerror or error}") from None


def is_image(container: InputContainer) -> bool:
    """A still picture, by its content and not by its name."""
    if container.metadata.get("major_brand") in _PICTURE_BRANDS:
        return True
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def load_image(path: str | Path) -> np.ndarray:
    """uint8 [H, W, 3], RGB, upright.

    Raises:
        VideoError: damaged, too large, or an animation that libav takes for a still.
    """
    # Pillow, not libav: it turns pictures by their EXIF orientation, mirrored ones too.
    hint = "" if _reads_heic() else " (HEIC needs pillow-heif: pip install 'megatron-video[data]')"
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise VideoError(f"{path}: an animated {image.format}, which libav cannot decode; convert it to mp4")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: cannot be read as an image: {error}{hint}") from None


@lru_cache(maxsize=1)
def _reads_heic() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def promised_frames(container: InputContainer, stream: VideoStream) -> int:
    """Frames that must be in the file if it is whole, before any is read; 0 where the container does not say."""
    # The frame count of an mp4 header also counts what an edit list cuts away; its index does not.
    return len(stream.index_entries) if _has_index(container, stream) else stream.frames


def shown_frames(path: str | Path, container: InputContainer, stream: VideoStream) -> int:
    """Frames that decoding must give, from the index where there is one, else by reading all packets."""
    if _has_index(container, stream):
        return sum(not entry.is_discard for entry in stream.index_entries)
    return frame_table(path).num_frames


def frame_table(path: str | Path) -> FrameTable:
    """Read the packets of a file; the last few tables are kept.

    Raises:
        VideoError: unreadable, or the data of a frame is not complete.
    """
    return _frame_table(str(path), os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)


def frame_seconds(table: FrameTable, rate: Fraction) -> np.ndarray:
    """float64 [T+1]: when each frame appears, counted from the first, and when the last one ends; T > 0.

    `rate` gives the times of files that have none, and how long the last frame is shown.
    """
    if not table.timed:
        return np.arange(table.num_frames + 1) / float(rate)
    starts = (table.times - table.times[0]) * float(table.time_base)
    # Nanoseconds: 60 frames at 24 per second last 2.5 s, not 2.4999999999999996.
    return np.round(np.append(starts, starts[-1] + 1 / float(rate)), 9)


def _has_index(container: InputContainer, stream: VideoStream) -> bool:
    return bool(stream.frames) and "mp4" in container.format.name and len(stream.index_entries) > 0


@lru_cache(maxsize=8)
def _frame_table(path: str, modified_ns: int) -> FrameTable:
    times, keyframe_times, num_packets = array("q"), array("q"), 0
    with open_video(path) as (container, stream):
        time_base = stream.time_base or Fraction(1)
        for packet in container.demux(stream):
            # The last packet is an empty flush.
            if not packet.size:
                continue
            if packet.is_corrupt:
                raise VideoError(f"{path}: cut short or damaged: the data of frame {num_packets} is not complete")
            num_packets += 1
            # Discarded ones lie outside the edit list and show no frame.
            if packet.is_discard:
                continue
            times.append(_NO_TIME if packet.pts is None else packet.pts)
            if packet.is_keyframe:
                keyframe_times.append(times[-1])
    return _ordered(np.asarray(times), np.asarray(keyframe_times), time_base, num_packets)


def _ordered(times: np.ndarray, keyframe_times: np.ndarray, time_base: Fraction, num_packets: int) -> FrameTable:
    ordered = np.sort(times)
    timed = len(times) > 0 and ordered[0] != _NO_TIME and bool((np.diff(ordered) > 0).all())
    keyframes = np.sort(np.searchsorted(ordered, keyframe_times)) if timed else np.zeros(0, np.int64)
    return FrameTable(ordered if timed else times, keyframes, time_base, timed, num_packets)
