"""Reading and writing video and image files through PyAV (libav); no ffmpeg binary is needed.

Every reader sees the picture as a viewer would: rotation metadata is applied, pixels are 8-bit RGB, and resizing runs
inside libav's filter graph (the fastest CPU path measured). A file that is cut short or damaged raises `VideoError`
instead of giving fewer or wrong frames. Axes: T frames, H rows, W columns, C colours.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from megatron_video.buckets import CropBox
from megatron_video.errors import UserError

# What a folder scan takes for media; a file named in a listing may have any suffix.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Up to here decoding from the start is cheaper than reading the packet table and seeking.
_SEEK_FROM_FRAME = 64
_SCALER_FLAGS = "bicubic+accurate_rnd+full_chroma_int+bitexact"
# degrees counter-clockwise in the display matrix -> libav filters that turn the picture upright
_ROTATION_FILTERS: dict[int, tuple[tuple[str, str], ...]] = {
    0: (),
    90: (("transpose", "cclock"),),
    180: (("hflip", ""), ("vflip", "")),
    270: (("transpose", "clock"),),
}


class VideoError(UserError):
    """One file cannot be read or written; stages turn it into a dropped row."""


@dataclass(frozen=True)
class VideoInfo:
    """What the container says of a file and what its packets show."""

    path: str
    codec: str
    """libav's decoder name, such as "h264" or "png"."""
    fps: float
    """Average frames per second; 0 for an image."""
    declared_frames: int
    """Frames the header promises; 0 where the container has no such field."""
    num_frames: int
    """Frames whose packets are in the file."""
    duration: float
    """Seconds."""
    width: int
    """Pixels, after rotation."""
    height: int
    """Pixels, after rotation."""
    rotation: int
    """Degrees counter-clockwise (0, 90, 180, 270) by which a viewer turns the coded picture."""
    pixel_format: str
    is_image: bool


def probe(path: str | Path) -> VideoInfo:
    """Read the header, walk the packets, decode the first frame.

    Raises:
        VideoError: no such file, not a video or image, no video stream, or fewer frames than the header promises.
    """
    num_frames = len(_packet_times(str(path), _modified(path)))
    with _open(path) as (container, stream):
        info = _probe_image(path, stream) if _is_image(container) else _probe_video(path, container, stream, num_frames)
    if info.declared_frames > info.num_frames:
        raise VideoError(
            f"{path}: cut short: the header promises {info.declared_frames} frames, {info.num_frames} are there"
        )
    return info


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
) -> Iterator[np.ndarray]:
    """Yield frames `start_frame` to `stop_frame` (exclusive; the end if None), one uint8 [H, W, 3] at a time.

    `keep` leaves out the conversion of the other frames. Arguments and errors otherwise as `read_frames`.
    """
    with _open(path) as (container, stream):
        graph: _Pictures | None = None
        decoded = _decode_image(path) if _is_image(container) else _decode(container, stream, path, start_frame)
        # Where the header promises nothing, the packets say how many frames there must be.
        expected = stop_frame or stream.frames or len(_packet_times(str(path), _modified(path)))
        number = start_frame - 1
        for number, frame in decoded:
            if number < start_frame or (keep is not None and number not in keep):
                continue
            # Built from the first frame, as only frames know their rotation and colour matrix.
            graph = graph or _Pictures(frame, size, crop)
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
    # In the same folder, so that the rename is atomic; the process id keeps two writers apart.
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        _encode_h264(temporary, frames, fps, {"crf": str(crf), "preset": preset})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stream_rate(stream: VideoStream) -> Fraction:
    """Average frame rate of a stream, or the demuxer's guess where the container has none."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate.numerator, rate.denominator) if rate else Fraction(25)


def _encode_h264(path: Path, frames: np.ndarray, fps: float, options: dict[str, str]) -> None:
    # One thread and bitexact: the bytes must not depend on the machine. Faststart: the header survives a cut tail.
    # mbtree off: with SIMD it reads memory that x264 did not set, and the bytes differ from process to process.
    flags = {"movflags": "+faststart", "fflags": "+bitexact"}
    parameters = "mbtree=0:colorprim=bt709:transfer=bt709:colormatrix=bt709"
    with av.open(str(path), "w", format="mp4", options=flags) as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(100_000),
            options={**options, "threads": "1", "flags": "+bitexact", "x264-params": parameters},
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open for decoding; libav's errors of the whole `with` block become `VideoError`s naming the file."""
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError(f"{path}: no video stream in it")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be read: {error.strerror or error}") from None


def _is_image(container: InputContainer) -> bool:
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _probe_video(path: str | Path, container: InputContainer, stream: VideoStream, num_frames: int) -> VideoInfo:
    first = next(container.decode(stream), None)
    if first is None:
        raise VideoError(f"{path}: no frame can be decoded")
    rotation = int(first.rotation) % 360
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    fps = float(stream_rate(stream))
    return VideoInfo(
        path=str(path),
        codec=stream.codec_context.codec.name,
        fps=fps,
        declared_frames=stream.frames,
        num_frames=num_frames,
        duration=num_frames / fps,
        width=width,
        height=height,
        rotation=rotation,
        pixel_format=first.format.name,
        is_image=False,
    )


def _probe_image(path: str | Path, stream: VideoStream) -> VideoInfo:
    height, width = _load_image(path).shape[:2]
    return VideoInfo(
        path=str(path),
        codec=stream.codec_context.codec.name,
        fps=0.0,
        declared_frames=1,
        num_frames=1,
        duration=0.0,
        width=width,
        height=height,
        rotation=0,
        pixel_format=stream.codec_context.pix_fmt or "",
        is_image=True,
    )


def _load_image(path: str | Path) -> np.ndarray:
    # Pillow, not libav: it turns pictures by their EXIF orientation, mirrored ones too.
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: cannot be read as an image: {error}") from None


def _decode_image(path: str | Path) -> Iterator[tuple[int, VideoFrame]]:
    yield 0, VideoFrame.from_ndarray(_load_image(path), format="rgb24")


def _modified(path: str | Path) -> int:
    return os.stat(path).st_mtime_ns if os.path.isfile(path) else 0


@lru_cache(maxsize=8)
def _packet_times(path: str, modified_ns: int) -> tuple[int | None, ...]:
    """Presentation times of all frames in ascending order: exact frame numbers, also for variable frame rates."""
    with _open(path) as (container, stream):
        # The last packet is an empty flush; discarded ones lie outside the edit list and show no frame.
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        damaged = [number for number, packet in enumerate(packets) if packet.is_corrupt]
        if damaged:
            raise VideoError(f"{path}: cut short or damaged: the data of frame {damaged[0]} is not complete")
        return tuple(sorted((p.pts for p in packets), key=lambda pts: -1 if pts is None else pts))


def _decode(
    container: InputContainer, stream: VideoStream, path: str | Path, start_frame: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (frame number, frame) from `start_frame` or a little before it."""
    number = 0
    if start_frame >= _SEEK_FROM_FRAME:
        times = _packet_times(str(path), _modified(path))
        numbers = {pts: index for index, pts in enumerate(times) if pts is not None}
        # Without distinct times (raw streams, some AVI) frames can only be counted from the start.
        if len(numbers) == len(times) > start_frame:
            container.seek(times[start_frame] or 0, stream=stream)
            for frame in container.decode(stream):
                if frame.pts in numbers:
                    yield numbers[frame.pts], _intact(frame, path, numbers[frame.pts])
            return
    for number, frame in enumerate(container.decode(stream)):
        yield number, _intact(frame, path, number)


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
    """libav filter graph: upright -> crop box -> scale to cover -> centre crop -> 8-bit RGB."""

    def __init__(self, frame: VideoFrame, size: tuple[int, int] | None, crop: CropBox | None) -> None:
        rotation = int(frame.rotation) % 360
        width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
        # Other angles than quarter turns are not turned; no camera writes them.
        filters = [*_ROTATION_FILTERS.get(rotation, ())]
        if crop is not None:
            filters.append(("crop", f"{crop.width}:{crop.height}:{crop.x}:{crop.y}:exact=1"))
            width, height = crop.width, crop.height
        filters += _cover(width, height, size)
        self._graph = Graph()
        nodes = [self._graph.add("buffer", _buffer_arguments(frame))]
        nodes += [self._graph.add(name, arguments) for name, arguments in filters]
        nodes += [self._graph.add("format", "rgb24"), self._graph.add("buffersink")]
        self._graph.link_nodes(*nodes)
        self._graph.configure()

    def convert(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3]."""
        self._graph.vpush(frame)
        return self._graph.vpull().to_ndarray()


def _buffer_arguments(frame: VideoFrame) -> str:
    # The graph keeps the frame's colour matrix and range: without them BT.709 would be read as BT.601.
    return (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    )


def _cover(width: int, height: int, size: tuple[int, int] | None) -> list[tuple[str, str]]:
    if size is None:
        return [("scale", f"flags={_SCALER_FLAGS}")]
    target_height, target_width = size
    factor = max(target_height / height, target_width / width)
    # Rounding must not leave the picture a pixel short of the target.
    scaled_width, scaled_height = max(target_width, round(width * factor)), max(target_height, round(height * factor))
    return [
        ("scale", f"{scaled_width}:{scaled_height}:flags={_SCALER_FLAGS}"),
        ("crop", f"{target_width}:{target_height}:exact=1"),
    ]
