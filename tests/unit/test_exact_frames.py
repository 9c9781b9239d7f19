"""Frame numbers are exact in every codec and container: read from any frame on, against numbers in the pictures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from nasty_videos import CODECS, Codec, numbers_of, scenes, trimmed_copy, write_video

from megatron_video.video_io import probe, read_frames
from megatron_video.video_probe import frame_times

_OPEN_X265 = "pools=none:frame-threads=1:log-level=none:keyint=50:min-keyint=50:open-gop=1:bframes=8:b-adapt=0:crf=8"
_OPEN_X264 = "keyint=50:min-keyint=50:open-gop=1:bframes=6:b-adapt=0:scenecut=0:threads=1:crf=8"
# Frames that are shown before a key frame and coded after it: the decoder throws them away after a seek to it.
OPEN_GOP = {
    f"{name}{suffix}": Codec(encoder, suffix, options={option: value})
    for name, encoder, option, value in (
        ("hevc", "libx265", "x265-params", f"{_OPEN_X265}:scenecut=0"),
        ("h264", "libx264", "x264-params", _OPEN_X264),
    )
    for suffix in (".mp4", ".mkv", ".ts")
}


@pytest.mark.parametrize("name", [*CODECS, *OPEN_GOP])
def test_reading_from_any_frame_gives_that_frame(tmp_path: Path, name: str) -> None:
    codec = (CODECS | OPEN_GOP)[name]
    path = write_video(tmp_path / f"video{codec.suffix}", scenes([160], 64, 80), codec)
    info = probe(path)
    assert (info.num_frames, info.fps, info.variable_fps) == (160, 24, False)
    assert info.duration == pytest.approx(160 / 24, abs=0.002)
    everything = read_frames(path)
    # A lossy codec blends neighbours in the patch a little.
    assert np.abs(np.array(numbers_of(everything)) - np.arange(160)).max() <= 2
    for start in (0, 63, 64, 65, 80, *range(92, 112), 147, 159):
        assert np.array_equal(read_frames(path, start, 1)[0], everything[start])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_times_of_a_variable_frame_rate(tmp_path: Path, suffix: str) -> None:
    gaps = np.random.default_rng(0).integers(1, 5, 119)
    times = [0, *np.cumsum(gaps).tolist()]
    path = write_video(tmp_path / f"variable{suffix}", scenes([120], 64, 80), times=times)
    info = probe(path)
    assert (info.num_frames, info.variable_fps) == (120, True)
    assert info.fps == pytest.approx(119 / times[-1] * 24, rel=0.02)
    assert frame_times(path)[:-1] == pytest.approx(np.array(times) / 24, abs=0.001)
    assert np.abs(np.array(numbers_of(read_frames(path, 90, 20))) - np.arange(90, 110)).max() <= 1


def test_what_an_edit_list_hides_is_not_counted(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", scenes([120], 64, 80), Codec("libx264", ".mp4", options={"g": "48"}))
    path = trimmed_copy(whole, tmp_path / "trimmed.mp4", seconds=3, lead=1)
    info = probe(path)
    # The header counts all 72 frames of the copy, and gives a rate that is no camera's.
    assert (info.num_frames, info.fps, info.duration) == (48, 24, 2)
    assert np.abs(np.array(numbers_of(read_frames(path))) - np.arange(72, 120)).max() <= 1
    assert np.abs(np.array(numbers_of(read_frames(path, 20, 5))) - np.arange(92, 97)).max() <= 1


@pytest.mark.parametrize(("rate", "suffix"), [("30000/1001", ".mkv"), ("24000/1001", ".mp4"), ("12", ".gif")])
def test_constant_rates_survive_the_rounding_of_times(tmp_path: Path, rate: str, suffix: str) -> None:
    path = tmp_path / f"rate{suffix}"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("gif" if suffix == ".gif" else "libx264", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb8" if suffix == ".gif" else "yuv420p"
        for picture in scenes([50], 48, 64):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    info = probe(path)
    assert not info.variable_fps
    assert info.fps == pytest.approx(float(Fraction(rate)), rel=1e-3)
