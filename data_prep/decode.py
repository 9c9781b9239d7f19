"""Frames of a clip for the Video-VAE: which decoder reads it, and the pixels that both must agree on.

PyAV reads everything, on the CPU. DALI reads what NVDEC decodes, on the GPU; files that it cannot read go to PyAV by a
rule on the manifest alone, so that the choice never depends on what happens to fail.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.encode_plan import window_of
from megatron_video.buckets import Bucket, CropBox, crop_of
from megatron_video.errors import UserError
from megatron_video.manifest import Row
from megatron_video.video_io import VideoError, iter_frames

DECODERS = ("auto", "pyav", "dali")
# What NVDEC decodes: libav's decoder names, and 8-bit 4:2:0.
NVDEC_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mpeg4"})
NVDEC_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p", "nv12"})
# DALI takes the whole file into memory.
MAX_NVDEC_BYTES = 2 << 30
_FRAMES_AT_ONCE = 16


class Decoder(Protocol):
    """Reads the window of a clip that its bucket takes."""

    def decode(self, row: Row, bucket: Bucket) -> Tensor:
        """uint8 [T, H, W, 3] in the bucket's size, RGB.

        Raises:
            VideoError: unreadable, damaged, or shorter than the bucket.
        """


class CpuDecoder:
    """PyAV: decoding, scaling and cropping inside libav."""

    def decode(self, row: Row, bucket: Bucket) -> Tensor:
        """See `Decoder`; on the CPU."""
        start, stop = window_of(row, bucket)
        # Into one array: a list and its stack would hold the clip twice.
        frames = np.empty((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        number = -1
        size = (bucket.height, bucket.width)
        for number, frame in enumerate(iter_frames(row["source"], start, stop, size=size, crop=crop_of(row))):
            frames[number] = frame
        if number + 1 != bucket.frames:
            raise VideoError(f"{row['source']}: only {number + 1} of {bucket.frames} frames from {start} on")
        return torch.from_numpy(frames)


def choose_decoder(name: str, device: str) -> str:
    """ "pyav" or "dali" for what the user asked for.

    Raises:
        UserError: DALI without a GPU, or not installed.
    """
    if name not in DECODERS:
        raise UserError(f"--decoder {name} is none of {', '.join(DECODERS)}")
    on_gpu, installed = device.startswith("cuda"), _dali_installed()
    if name == "auto":
        return "dali" if on_gpu and installed else "pyav"
    if name == "dali" and not on_gpu:
        raise UserError(f"--decoder dali decodes on a GPU, and --device is {device}; use --decoder pyav")
    if name == "dali" and not installed:
        raise UserError("--decoder dali needs NVIDIA DALI: pip install 'megatron-video[gpu]', or use --decoder pyav")
    return name


def build_decoder(name: str, device: torch.device) -> Decoder:
    """The decoder that `choose_decoder` named."""
    if name == "pyav":
        return CpuDecoder()
    # Imported only where it is used: DALI is no dependency of machines without a GPU.
    from data_prep.decode_dali import DaliDecoder

    return DaliDecoder(device)


def nvdec_reads(row: Row) -> bool:
    """Whether the file goes to NVDEC: a rule on codec, pixel format, HDR and size."""
    # Tones of HDR are mapped on the CPU.
    if row["is_image"] or row["hdr"]:
        return False
    if row["codec"] not in NVDEC_CODECS or row["pixel_format"] not in NVDEC_PIXEL_FORMATS:
        return False
    path = Path(row["source"])
    return path.is_file() and path.stat().st_size <= MAX_NVDEC_BYTES


def fit_pixels(frames: Tensor, rotation: int, crop: CropBox | None, size: tuple[int, int]) -> Tensor:
    """Coded frames uint8 [T, H, W, 3] -> upright, cropped, scaled to cover `size` and cut about the centre.

    The same geometry as `video_io.read_frames`; bicubic of torch, not of libav: a few values of 255 differ, the mean
    by far less than one (tests/unit/test_decode.py states the tolerance).
    """
    frames = torch.rot90(frames, rotation // 90, dims=(1, 2))
    if crop is not None:
        frames = frames[:, crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
    height, width = frames.shape[1:3]
    factor = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * factor)), max(size[1], round(width * factor)))
    # Even, as in video_io, where colours are still halved at this point.
    top, left = (scaled[0] - size[0]) // 4 * 2, (scaled[1] - size[1]) // 4 * 2
    # A few at a time: in fp32 a long clip of a large video would take gigabytes.
    parts = [
        _scale(part, scaled)[:, top : top + size[0], left : left + size[1]] for part in frames.split(_FRAMES_AT_ONCE)
    ]
    return torch.cat(parts).contiguous()


def _scale(frames: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(frames.shape[1:3]) == size:
        return frames
    pixels = frames.permute(0, 3, 1, 2).float()
    scaled = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _dali_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
