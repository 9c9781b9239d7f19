"""Decoding on NVDEC through NVIDIA DALI 2: frames never pass the CPU.

DALI takes the file's bytes and the first frame, and gives RGB frames on the GPU; turning, cropping and scaling is
`decode.fit_pixels` on the same GPU. Written against DALI 2's `fn.decoders.video`.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from data_prep.decode import CpuDecoder, fit_pixels, nvdec_reads
from data_prep.encode_plan import window_of
from megatron_video.buckets import Bucket, crop_of
from megatron_video.manifest import Row
from megatron_video.video_io import VideoError


class DaliDecoder:
    """NVDEC for the files that it reads, PyAV for the others; safe to call from several threads."""

    def __init__(self, device: torch.device) -> None:
        """`device`: the GPU that decodes and keeps the frames."""
        self.device = device
        self._cpu = CpuDecoder()
        self._pipelines: dict[int, Any] = {}
        # One pipeline is one stream of work; NVDEC is busy with one clip at a time anyway.
        self._lock = threading.Lock()

    def decode(self, row: Row, bucket: Bucket) -> Tensor:
        """See `decode.Decoder`; on the GPU, or on the CPU for what NVDEC does not read."""
        if not nvdec_reads(row):
            return self._cpu.decode(row, bucket)
        with self._lock:
            frames = self._run(row, bucket)
            if len(frames) != bucket.frames:
                raise VideoError(f"{row['source']}: only {len(frames)} of {bucket.frames} frames can be decoded")
            # Made from DALI's buffer before the next run fills it again.
            pixels = fit_pixels(frames, row["rotation"] or 0, crop_of(row), (bucket.height, bucket.width))
            torch.cuda.synchronize(self.device)
            return pixels.clone() if pixels.data_ptr() == frames.data_ptr() else pixels

    def _run(self, row: Row, bucket: Bucket) -> Tensor:
        """Coded frames uint8 [T, H, W, 3] of the window; a view of DALI's memory."""
        start, _ = window_of(row, bucket)
        pipeline = self._pipeline(bucket.frames)
        try:
            pipeline.feed_input("encoded", [np.fromfile(row["source"], dtype=np.uint8)])
            pipeline.feed_input("start", [np.array(start, dtype=np.int32)])
            (frames,) = pipeline.run()
        except (RuntimeError, OSError) as error:
            # A pipeline that failed once cannot be run again.
            self._pipelines.clear()
            raise VideoError(f"{row['source']}: NVDEC cannot decode it: {str(error).splitlines()[0]}") from None
        return torch.from_dlpack(frames[0])

    def _pipeline(self, num_frames: int) -> Any:
        if num_frames not in self._pipelines:
            self._pipelines[num_frames] = _video_pipeline(self.device, num_frames)
        return self._pipelines[num_frames]


def _video_pipeline(device: torch.device, num_frames: int) -> Any:
    @pipeline_def(batch_size=1, num_threads=1, device_id=device.index or 0, prefetch_queue_depth=1, exec_dynamic=True)
    def decode() -> Any:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", device="cpu", dtype=types.INT32, ndim=0)
        # It left `experimental` in one of the 2.x releases.
        video = getattr(fn.decoders, "video", None) or fn.experimental.decoders.video
        # No padding: a file that is too short gives fewer frames, which is noticed.
        return video(encoded, device="mixed", start_frame=start, sequence_length=num_frames, pad_mode="none")

    pipeline = decode()
    pipeline.build()
    return pipeline
