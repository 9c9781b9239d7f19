"""Decoders of the encode stage: the reader's pixels, and torch's scaling against libav's within a tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.decode import CpuDecoder, choose_decoder, fit_pixels, nvdec_reads
from megatron_video.buckets import Bucket, CropBox
from megatron_video.errors import UserError
from megatron_video.video_io import VideoError, read_frames, write_mp4

# Values of 255 between torch's and libav's bicubic: mean, and the 99.9th percentile.
MEAN_TOLERANCE, PEAK_TOLERANCE = 0.6, 6.0


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(20, 3, 12, 18, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(140, 220), mode="bicubic").clamp(0, 1) * 255
    path = tmp_path_factory.mktemp("decode") / "clip.mp4"
    write_mp4(path, pixels.byte().permute(0, 2, 3, 1).numpy(), fps=25, crf=12)
    return path


def row_of(path: Path, **fields: Any) -> dict[str, Any]:
    row = {"source": str(path), "start_frame": 0, "end_frame": 20, "border_share": None, "rotation": 0}
    return row | {"is_image": False, "hdr": False, "codec": "h264", "pixel_format": "yuv420p"} | fields


def test_cpu_decoder_gives_the_middle_frames_of_the_reader(video: Path) -> None:
    bucket = Bucket(9, 48, 64)
    expected = read_frames(video, 5, 9, size=(48, 64))
    assert np.array_equal(CpuDecoder().decode(row_of(video), bucket).numpy(), expected)
    with pytest.raises(VideoError, match=r"clip\.mp4"):
        CpuDecoder().decode(row_of(video, end_frame=40), Bucket(34, 48, 64))


@pytest.mark.parametrize("crop", [None, CropBox(10, 6, 180, 130)])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (208, 320)])
def test_scaling_on_the_gpu_path_agrees_with_libav(video: Path, crop: CropBox | None, size: tuple[int, int]) -> None:
    expected = read_frames(video, 2, 17, size=size, crop=crop)
    found = fit_pixels(torch.from_numpy(read_frames(video, 2, 17)), 0, crop, size).numpy()
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.mean() < MEAN_TOLERANCE
    assert np.percentile(difference, 99.9) < PEAK_TOLERANCE


def test_turning_is_counter_clockwise() -> None:
    picture = torch.arange(2 * 3).reshape(1, 2, 3, 1).expand(1, 2, 3, 3).byte()
    turned = fit_pixels(picture, 90, None, (3, 2))[0, :, :, 0]
    # The right column becomes the top row.
    assert turned.tolist() == [[2, 5], [1, 4], [0, 3]]


def test_what_goes_to_nvdec_depends_on_the_manifest_alone(video: Path) -> None:
    assert nvdec_reads(row_of(video))
    refused = {"pixel_format": "yuv420p10le", "codec": "prores", "is_image": True, "hdr": True, "source": "nowhere"}
    for other in ({name: value} for name, value in refused.items()):
        assert not nvdec_reads(row_of(video) | other)


def test_decoder_choice() -> None:
    assert choose_decoder("auto", "cpu") == "pyav"
    assert choose_decoder("pyav", "cuda") == "pyav"
    with pytest.raises(UserError, match="--decoder pyav"):
        choose_decoder("dali", "cpu")
    with pytest.raises(UserError, match="none of auto, pyav, dali"):
        choose_decoder("nvdec", "cpu")
