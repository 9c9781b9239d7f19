"""Reading and writing video and image files through PyAV (libav); no ffmpeg binary is needed.

Every reader sees the picture as a viewer would: rotation metadata is applied, pixels are 8-bit RGB, HDR is tone-mapped,
and resizing runs inside libav's filter graph (the fastest CPU path measured). A file that is cut short or damaged gives
a `VideoError` instead of fewer or wrong frames. Axes: T frames, H rows, W columns, C colours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.stream import VideoStream

from megatron_video.buckets import CropBox
from megatron_video.files import appearing
from megatron_video.tone_mapping import tone_map_of
from megatron_video.video_file import (
    FrameTable,
    VideoError,
    frame_table,
    is_image,
    load_image,
    open_video,
    shown_frames,
)
from megatron_video.video_probe import VideoInfo as VideoInfo
from megatron_video.video_probe import probe as probe

# What a folder scan takes for media; a file named in a listing may have any suffix.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".ogv"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".mxf", ".y4m", ".gif"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff")

# Up to here decoding from the start is cheaper than reading the packet table and seeking.
_SEEK_FROM_FRAME = 64
# Of variable frame rates; the customary unit, in which 24, 25, 30 and 60 frames per second are exact.
_TICKS_PER_SECOND = 90_000
_SCALER_FLAGS = "bicubic+accurate_rnd+full_chroma_int+bitexact"
_ROUGH_SCALER_FLAGS = "area+bitexact"
# degrees counter-clockwise in the display matrix -> libav filters that turn the picture upright
_ROTATION_FILTERS: dict[int, tuple[tuple[str, str], ...]] = {
    0: (),
    90: (("transpose", "cclock"),),
    180: (("hflip", ""), ("vflip", "")),
    270: (("transpose", "clock"),),
}


def read_frames(
    path: str | Path,
    start_frame: int = 0,
    num_frames: int | None = None,
    *,
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    crop: CropBox | None = None,
) -> np.ndarray:
    """Decode `num_frames` frames from `start_frame` (to the end if None), or the frames numbered `indices`.

    Args:
        indices: increasing frame numbers; replaces `start_frame` and `num_frames`.
        size: (height, width) in pixels; the picture is scaled to cover it and cropped about its centre.
        crop: part of the upright picture that is used, before scaling (black borders are cut off with it).

    Returns:
        uint8 [T, H, W, 3], RGB. An image gives T=1.

    Raises:
        VideoError: unreadable, damaged, or shorter than asked.
    """
    wanted = _wanted(start_frame, num_frames, indices)
    stop_frame = None if wanted is None else wanted[-1] + 1
    first = start_frame if wanted is None else wanted[0]
    keep = None if wanted is None else frozenset(wanted)
    frames = list(iter_frames(path, first, stop_frame, size=size, crop=crop, keep=keep))
    if not frames or (wanted is not None and len(frames) != len(wanted)):
        raise VideoError(f"{path}: only {len(frames)} of the frames asked for, from frame {first} on, can be decoded")
    return np.stack(frames)


def iter_frames(
    path: str | Path,
    start_frame: int = 0,
    stop_frame: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    crop: CropBox | None = None,
    keep: frozenset[int] | None = None,
    rough: bool = False,
) -> Iterator[np.ndarray]:
    """Yield frames `start_frame` to `stop_frame` (exclusive; the end if None), one uint8 [H, W, 3] at a time.

    `keep` leaves out the conversion of the other frames; `rough` shrinks by averaging and leaves tones as they are,
    for analysis and not for looking at, in a third of the time. Arguments and errors otherwise as `read_frames`.
    """
    with open_video(path) as (container, stream):
        graph: _Pictures | None = None
        decoded = _decode_image(path) if is_image(container) else _decode(container, stream, path, start_frame)
        # Where the header promises nothing, the packets say how many frames there must be.
        expected = stop_frame or shown_frames(path, container, stream)
        number = start_frame - 1
        for number, frame in decoded:
            if number < start_frame or (keep is not None and number not in keep):
                continue
            # Built from the first frame, as only frames know their rotation and colour matrix.
            graph = graph or _Pictures(frame, size, crop, rough)
            yield graph.convert(frame)
            if number + 1 == stop_frame:
                return
    if number + 1 < expected:
        raise VideoError(f"{path}: {expected} frames expected, only {number + 1} can be decoded")


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, crf: int = 18, preset: str = "medium") -> None:
    """Encode uint8 [T, H, W, 3] as H.264 (yuv420p, BT.709), under a temporary name first. Same input, same bytes.

    Raises:
        VideoError: another shape or dtype, or an odd height or width (4:2:0 colour needs even ones).
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(f"{path}: frames must be uint8 [T>0, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"{path}: H.264 needs even sizes, not height {height} x width {width}")
    write_mp4_stream(path, iter(frames), fps, crf, preset)


def write_mp4_stream(
    path: str | Path,
    frames: Iterator[np.ndarray],
    fps: float,
    crf: int = 18,
    preset: str = "medium",
    times: Sequence[float] | np.ndarray | None = None,
) -> None:
    """As `write_mp4`, for frames that come one at a time, uint8 [H, W, 3] each; memory does not grow with their number.

    Args:
        times: seconds at which each frame is shown, where they are not 1 / fps apart.
    """
    rate = Fraction(fps).limit_denominator(100_000)
    ticks = None if times is None else [round((time - times[0]) * _TICKS_PER_SECOND) for time in times]
    with appearing(Path(path)) as temporary:
        _encode_h264(temporary, frames, rate, {"crf": str(crf), "preset": preset}, ticks)


def _encode_h264(
    path: Path, frames: Iterator[np.ndarray], rate: Fraction, options: dict[str, str], ticks: Sequence[int] | None
) -> None:
    # One thread and bitexact: the bytes must not depend on the machine. Faststart: the header survives a cut tail.
    # mbtree off: with SIMD it reads memory that x264 did not set, and the bytes differ from process to process.
    flags = {"movflags": "+faststart", "fflags": "+bitexact"}
    parameters = "mbtree=0:colorprim=bt709:transfer=bt709:colormatrix=bt709"
    first = next(frames)
    with av.open(str(path), "w", format="mp4", options=flags) as container:
        stream = container.add_stream(
            "libx264",
            rate=rate,
            options={**options, "threads": "1", "flags": "+bitexact", "x264-params": parameters},
        )
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, _TICKS_PER_SECOND)
        for number, picture in enumerate(itertools.chain([first], frames)):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], Fraction(1, _TICKS_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _decode_image(path: str | Path) -> Iterator[tuple[int, VideoFrame]]:
    yield 0, VideoFrame.from_ndarray(load_image(path), format="rgb24")


def _decode(
    container: InputContainer, stream: VideoStream, path: str | Path, start_frame: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (frame number, frame) from `start_frame` or a little before it."""
    if start_frame >= _SEEK_FROM_FRAME:
        table = frame_table(path)
        # Without a time for each frame, frames can only be counted from the start.
        if table.timed and start_frame < table.num_frames:
            yield from _decode_from(container, stream, path, start_frame, table)
            return
    for number, frame in enumerate(container.decode(stream)):
        yield number, _intact(frame, path, number)


def _decode_from(
    container: InputContainer, stream: VideoStream, path: str | Path, start_frame: int, table: FrameTable
) -> Iterator[tuple[int, VideoFrame]]:
    for number, frame in _seek(container, stream, start_frame, table):
        # What lies before only leads up to it, and may lack its own references.
        if number >= start_frame:
            yield number, _intact(frame, path, number)


def _seek(
    container: InputContainer, stream: VideoStream, start_frame: int, table: FrameTable
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames from a key frame at or before `start_frame`, with their numbers."""
    # Demuxers seek by decoding time. A frame that is shown before a key frame but coded after it (open GOP of HEVC)
    # is lost then, so the key frame is chosen by the time of showing, and an earlier one if that did not do.
    before = table.keyframes[: np.searchsorted(table.keyframes, start_frame, side="right")]
    for time in (*(int(table.times[key]) for key in before[:-4:-1]), _stream_start(stream)):
        container.seek(time, stream=stream)
        frames = ((table.number_of(frame.pts), frame) for frame in container.decode(stream))
        numbered = ((number, frame) for number, frame in frames if number is not None)
        first = next(numbered, None)
        if first is not None and first[0] <= start_frame:
            yield first
            yield from numbered
            return


def _stream_start(stream: VideoStream) -> int:
    # Far below the first decoding time, which reordering puts before the first time of showing.
    return (stream.start_time or 0) - round(10 / (stream.time_base or 1))


def _intact(frame: VideoFrame, path: str | Path, number: int) -> VideoFrame:
    if frame.is_corrupt:
        raise VideoError(f"{path}: frame {number} is damaged")
    return frame


def _wanted(start_frame: int, num_frames: int | None, indices: Sequence[int] | None) -> Sequence[int] | None:
    if indices is not None:
        if not len(indices) or any(b <= a for a, b in itertools.pairwise(indices)):
            raise ValueError(f"indices must be increasing and not empty, not {list(indices)}")
        return indices
    return None if num_frames is None else range(start_frame, start_frame + num_frames)


class _Pictures:
    """libav filter graph: upright -> crop box -> scale to cover -> centre crop -> 8-bit RGB; HDR is toned after it."""

    def __init__(self, frame: VideoFrame, size: tuple[int, int] | None, crop: CropBox | None, rough: bool) -> None:
        rotation = int(frame.rotation) % 360
        width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
        # Other angles than quarter turns are not turned; no camera writes them.
        filters = [*_ROTATION_FILTERS.get(rotation, ())]
        if crop is not None:
            filters.append(("crop", f"{crop.width}:{crop.height}:{crop.x}:{crop.y}:exact=1"))
            width, height = crop.width, crop.height
        filters += _cover(width, height, size, _ROUGH_SCALER_FLAGS if rough else _SCALER_FLAGS)
        self._graph = Graph()
        nodes = [self._graph.add("buffer", _buffer_arguments(frame))]
        nodes += [self._graph.add(name, arguments) for name, arguments in filters]
        # For analysis the coded values do, and cuts are as clear in them.
        self._tones = None if rough else tone_map_of(frame)
        # libav's exact scaler has SIMD for planes of RGB only: a third of the time, and the same pixels.
        pixels = "rgb48le" if self._tones else "rgb24" if rough else "gbrp"
        nodes += [self._graph.add("format", pixels), self._graph.add("buffersink")]
        self._graph.link_nodes(*nodes)
        self._graph.configure()

    def convert(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3]."""
        self._graph.vpush(frame)
        picture = self._graph.vpull()
        if self._tones:
            return self._tones.convert(picture.to_ndarray())
        if picture.format.name == "rgb24":
            return picture.to_ndarray()
        green, blue, red = (_rows(plane) for plane in picture.planes)
        return cv2.merge([red, green, blue])


def _rows(plane: VideoPlane) -> np.ndarray:
    """uint8 [H, W]; a view, without what pads the rows."""
    pixels: np.ndarray = np.frombuffer(plane, np.uint8)  # type: ignore[call-overload]
    return pixels.reshape(-1, plane.line_size)[:, : plane.width]


def _buffer_arguments(frame: VideoFrame) -> str:
    # The graph keeps the frame's colour matrix and range: without them BT.709 would be read as BT.601.
    return (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    )


def _cover(width: int, height: int, size: tuple[int, int] | None, scaler: str) -> list[tuple[str, str]]:
    if size is None:
        return [("scale", f"flags={scaler}")]
    target_height, target_width = size
    factor = max(target_height / height, target_width / width)
    # Rounding must not leave the picture a pixel short of the target.
    scaled_width, scaled_height = max(target_width, round(width * factor)), max(target_height, round(height * factor))
    # Even offsets: this crop comes before the conversion to RGB, and an odd one would shift the halved colour planes.
    left, top = (scaled_width - target_width) // 4 * 2, (scaled_height - target_height) // 4 * 2
    return [
        ("scale", f"{scaled_width}:{scaled_height}:flags={scaler}"),
        ("crop", f"{target_width}:{target_height}:{left}:{top}:exact=1"),
    ]
