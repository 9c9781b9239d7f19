"""NVDEC through DALI against PyAV: the same frames, and pixels within a stated tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.decode import CpuDecoder
from megatron_video.buckets import Bucket
from megatron_video.video_io import VideoError, write_mp4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")

# Values of 255: DALI converts colours in another way (about 0.9 in the mean) and torch scales instead of libav.
MEAN_TOLERANCE, PEAK_TOLERANCE = 2.0, 12.0


def write_counting_video(path: Path, frames: int = 120) -> Path:
    """Every frame is told from its neighbours: a bar moves by two pixels a frame over a smooth picture."""
    y, x = np.mgrid[0:144, 0:256]
    pictures = np.stack([np.stack([x / 2 + y / 2, 255 - x / 2, 128 + y / 3], axis=-1)] * frames)
    for number in range(frames):
        pictures[number, :, 2 * number : 2 * number + 8] = 255
    write_mp4(path, pictures.clip(0, 255).astype(np.uint8), fps=25)
    return path


@pytest.mark.parametrize("start", [0, 40, 90])
@pytest.mark.parametrize("bucket", [Bucket(17, 48, 80), Bucket(17, 144, 256)])
def test_the_same_frames_within_the_tolerance(tmp_path: Path, start: int, bucket: Bucket) -> None:
    from data_prep.decode_dali import DaliDecoder

    path = write_counting_video(tmp_path / "clip.mp4")
    row = _row(path, start, start + 17)
    expected = CpuDecoder().decode(row, bucket).int()
    found = DaliDecoder(torch.device("cuda:0")).decode(row, bucket)
    assert found.is_cuda
    assert found.shape == expected.shape
    difference = (found.cpu().int() - expected).abs().float()
    # A frame off by one moves the bar, which no tolerance would hide.
    assert difference.mean() < MEAN_TOLERANCE
    assert np.percentile(difference.numpy(), 99.9) < PEAK_TOLERANCE


def test_a_file_that_is_no_video_is_a_clip_that_fails(tmp_path: Path) -> None:
    from data_prep.decode_dali import DaliDecoder

    good = write_counting_video(tmp_path / "clip.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing that a decoder knows" * 100)
    decoder = DaliDecoder(torch.device("cuda:0"))
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        decoder.decode(_row(bad, 0, 17), Bucket(17, 48, 80))
    # And the next clip is none the worse for it.
    assert decoder.decode(_row(good, 0, 17), Bucket(17, 48, 80)).shape == (17, 48, 80, 3)


def _row(path: Path, start: int, end: int) -> dict[str, Any]:
    row = {"source": str(path), "start_frame": start, "end_frame": end, "border_share": None, "rotation": 0}
    return row | {"is_image": False, "codec": "h264", "pixel_format": "yuv420p"}
