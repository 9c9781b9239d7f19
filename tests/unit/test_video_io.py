"""Video files: exact frame numbers, upright pictures, right colours, damage refused; OpenCV as second opinion."""

from __future__ import annotations

from pathlib import Path

import av
import av.filter
import cv2
import numpy as np
import pytest
from PIL import Image

from megatron_video.buckets import CropBox
from megatron_video.video_io import VideoError, probe, read_frames, write_mp4


def numbered_frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame number t is the grey level of the right half; the left half is plain red over blue."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2] = (200, 30, 40)
    frames[:, height // 2 :, : width // 2] = (40, 60, 210)
    frames[:, :, width // 2 :] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    return [round(float(frame[:, -16:].mean())) for frame in frames]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    write_mp4(path, numbered_frames(150), fps=25, crf=8)
    return path


def write_with_av(path: Path, frames: np.ndarray, rotation: int = 0, times: list[int] | None = None) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "8", "bf": "2"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_probe(video: Path) -> None:
    info = probe(video)
    assert (info.codec, info.pixel_format, info.fps, info.is_image) == ("h264", "yuv420p", 25.0, False)
    assert (info.num_frames, info.width, info.height, info.variable_fps, info.audio) == (150, 96, 64, False, False)
    assert (info.color_transfer, info.hdr) == ("bt709", False)
    assert info.duration == pytest.approx(6.0)


def test_frames_by_number_from_the_start_and_by_seeking(video: Path) -> None:
    assert numbers_of(read_frames(video)) == pytest.approx(list(range(150)), abs=1)
    everything = read_frames(video)
    for start, count in [(0, 3), (10, 17), (64, 17), (149, 1), (101, 49)]:
        assert np.array_equal(read_frames(video, start, count), everything[start : start + count])
    for indices in ([0, 7, 149], [90], [70, 71, 148]):
        assert np.array_equal(read_frames(video, indices=indices), everything[indices])


def test_frame_numbers_are_exact_with_a_variable_frame_rate(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).integers(1, 6, 120)).tolist()
    write_with_av(tmp_path / "variable.mp4", numbered_frames(120), times=times)
    assert numbers_of(read_frames(tmp_path / "variable.mp4", 80, 20)) == pytest.approx(list(range(80, 100)), abs=1)


def test_frames_agree_with_opencv(video: Path) -> None:
    capture = cv2.VideoCapture(str(video))
    theirs = np.stack([capture.read()[1][..., ::-1] for _ in range(20)]).astype(int)
    # OpenCV reads BT.709 as BT.601, so only its greys are comparable.
    assert np.abs(read_frames(video, 0, 20)[:, :, 64:].astype(int) - theirs[:, :, 64:]).max() <= 1


def test_colours_survive_the_round_trip(video: Path) -> None:
    frame = read_frames(video, 0, 1)[0].astype(int)
    assert frame[10, 10] == pytest.approx([200, 30, 40], abs=4)
    assert frame[50, 10] == pytest.approx([40, 60, 210], abs=4)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied_as_opencv_does(tmp_path: Path, rotation: int) -> None:
    path = tmp_path / "rotated.mp4"
    write_with_av(path, numbered_frames(5), rotation=rotation)
    theirs = cv2.VideoCapture(str(path)).read()[1][..., ::-1]
    ours = read_frames(path)
    info = probe(path)
    assert info.rotation == rotation
    assert ours.shape[1:] == theirs.shape == (info.height, info.width, 3)
    assert np.abs(ours[0].astype(int) - theirs).mean() < 3


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    frames = np.zeros((2, 60, 160, 3), np.uint8)
    frames[:, :, 50:110] = 255  # the middle 60 columns are white
    write_mp4(tmp_path / "wide.mp4", frames, fps=24, crf=8)
    square = read_frames(tmp_path / "wide.mp4", size=(30, 30))
    assert square.shape == (2, 30, 30, 3)
    assert square[:, :, 2:-2].min() > 235
    tall = read_frames(tmp_path / "wide.mp4", size=(48, 32), crop=CropBox(60, 10, 40, 40))
    assert tall.shape == (2, 48, 32, 3)
    assert tall.min() > 235


def test_resize_agrees_with_opencv_on_smooth_pictures(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(0, 255, (12, 16, 3)).astype(np.float32)
    picture = np.clip(cv2.resize(noise, (128, 96), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "smooth.png")
    ours = read_frames(tmp_path / "smooth.png", size=(48, 64))[0].astype(int)
    theirs = cv2.resize(picture, (64, 48), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(ours - theirs).mean() < 1.5


@pytest.mark.parametrize("size", [None, (48, 64), (37, 61), (128, 192)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le", "gray"])
def test_pixels_are_those_of_libavs_own_packed_rgb(
    tmp_path: Path, pixel_format: str, size: tuple[int, int] | None
) -> None:
    """Frames come as planes, for which libav has faster code; packed RGB at the same flags is the second opinion."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    path = tmp_path / "noise.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, pixel_format
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    flags = "flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
    scale = f"{max(size[1], round(size[0] * 1.5))}:{max(size[0], round(size[1] / 1.5))}:{flags}" if size else flags
    packed = []
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=container.streams.video[0]), graph.add("scale", scale)]
        graph.link_nodes(*nodes, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
        for frame in container.decode(video=0):
            graph.vpush(frame)
            packed.append(graph.vpull().to_ndarray())
    ours = read_frames(path, size=size)
    top, left = ((b - a) // 4 * 2 for a, b in zip(ours.shape[1:3], packed[0].shape[:2], strict=True))
    cut = np.stack(packed)[:, top : top + ours.shape[1], left : left + ours.shape[2]]
    assert np.array_equal(ours, cut)


@pytest.mark.parametrize(("suffix", "codec"), [(".png", "png"), (".jpg", "mjpeg"), (".webp", "webp")])
def test_images_are_clips_of_one_frame(tmp_path: Path, suffix: str, codec: str) -> None:
    picture = numbered_frames(1)[0]
    Image.fromarray(picture).save(tmp_path / f"picture{suffix}", quality=98)
    info = probe(tmp_path / f"picture{suffix}")
    assert (info.is_image, info.codec, info.num_frames, info.width, info.height) == (True, codec, 1, 96, 64)
    frames = read_frames(tmp_path / f"picture{suffix}")
    assert frames.shape == (1, 64, 96, 3)
    assert np.abs(frames[0].astype(int) - picture).mean() < (1 if suffix == ".png" else 6)


def test_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, numbered_frames(10), fps=24)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_write_refuses_odd_sizes_and_wrong_arrays(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="even sizes, not height 63"):
        write_mp4(tmp_path / "x.mp4", np.zeros((2, 63, 64, 3), np.uint8), fps=24)
    with pytest.raises(VideoError, match=r"float64 \[2, 64, 64\]"):
        write_mp4(tmp_path / "x.mp4", np.zeros((2, 64, 64)), fps=24)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_a_file_cut_short_is_refused(video: Path, tmp_path: Path, share: float) -> None:
    content = video.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        probe(path)
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        read_frames(path)


@pytest.mark.parametrize("seed", range(6))
def test_bit_rot_in_the_middle_is_refused(tmp_path: Path, seed: int) -> None:
    # In pictures of noise a flipped bit can decode to other noise; in plain ones it leaves the syntax.
    rng = np.random.default_rng(seed)
    path = tmp_path / "rot.mp4"
    frames = np.zeros((60, 96, 128, 3), np.uint8)
    for t in range(60):
        frames[t, 20:50, t : t + 30] = (200, 50, 60)
    write_mp4(path, frames, fps=24)
    content = bytearray(path.read_bytes())
    position = int(rng.integers(content.find(b"mdat") + 800, len(content) - 40))
    content[position] ^= 0x10
    if seed % 2:
        content[position : position + 40] = rng.bytes(40)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"rot\.mp4"):
        read_frames(path)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "empty.mp4", "absent.mp4"):
        with pytest.raises(VideoError, match=name):
            probe(tmp_path / name)
    write_mp4(tmp_path / "short.mp4", numbered_frames(20), fps=24)
    with pytest.raises(VideoError, match="30 frames expected, only 20"):
        read_frames(tmp_path / "short.mp4", 10, 20)
