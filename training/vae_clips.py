"""Clips for the Video-VAE: decoded at the buckets' sizes, split into training and held-out, cut into batches.

A batch is a pure function of (seed, step), so a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_video.buckets import Bucket, bucket_of, crop_of
from megatron_video.errors import UserError
from megatron_video.manifest import Row, kept_rows, read_manifest
from megatron_video.noise import NoiseSource
from megatron_video.video_io import read_frames
from training.vae_config import VAEStage, VAETrainConfig
from training.vae_ranks import Ranks

Frames = npt.NDArray[np.uint8]
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Clip:
    """A span of frames of a file, and the size it is decoded to."""

    row: Row
    bucket: Bucket

    @property
    def num_frames(self) -> int:
        """Frames of the whole span, at least the bucket's."""
        return 1 if self.row["is_image"] else self.row["end_frame"] - self.row["start_frame"]

    @property
    def num_bytes(self) -> int:
        """Of the decoded span."""
        return self.num_frames * self.bucket.height * self.bucket.width * 3

    def decode(self, start: int, frames: int) -> Frames:
        """uint8 [frames, H, W, 3], `start` frames into the span."""
        return read_frames(
            self.row["source"],
            self.row["start_frame"] + start,
            frames,
            size=(self.bucket.height, self.bucket.width),
            crop=crop_of(self.row),
        )


class TrainingClips:
    """Clips of a manifest.

    Args:
        config: names the manifest, buckets, split and memory limit.

    Raises:
        UserError: no manifest, no clip fits a bucket, too few clips for a split, or an unreadable clip.
    """

    def __init__(self, config: VAETrainConfig) -> None:
        self.config = config
        self.noise = NoiseSource(config.seed, "vae")
        groups = clips_by_bucket(config)
        held_out = {bucket: _num_held_out(len(clips), config) for bucket, clips in groups.items()}
        self.held_out = {bucket: clips[: held_out[bucket]] for bucket, clips in groups.items()}
        self.training = {bucket: clips[held_out[bucket] :] for bucket, clips in groups.items()}
        check_videos(config, self.training)
        self._threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self._cache: dict[int, Frames] = {}
        everything = [clip for clips in self.training.values() for clip in clips]
        self.num_bytes = sum(clip.num_bytes for clip in everything)
        if self.num_bytes <= config.cache_gib * 2**30:
            decoded = self._threads.map(lambda clip: clip.decode(0, clip.num_frames), everything)
            shown = tqdm(decoded, "decode clips", len(everything), disable=not sys.stderr.isatty())
            self._cache = {id(clip): frames for clip, frames in zip(everything, shown, strict=True)}

    def describe(self) -> str:
        """How many clips of each bucket, and whether they are in memory."""
        parts = [
            f"{bucket.name}: {len(clips)} + {len(self.held_out[bucket])} held out"
            for bucket, clips in self.training.items()
        ]
        place = "decoded in memory" if self._cache else f"over cache_gib={self.config.cache_gib:g}: decoded on the fly"
        return f"clips {'; '.join(parts)}; {self.num_bytes / 2**20:.0f} MiB, {place}"

    def batch(self, step: int, ranks: Ranks = ALONE) -> Tensor:
        """This rank's share of the pictures of `step` (from 0), uint8 [B, T, 3, H, W]."""
        stage = self.config.stage_at(step)
        generator = self.noise.generator("batch", 0, step)
        as_images = stage.frames == 1 or generator.random() < stage.image_share
        frames = 1 if as_images else stage.frames
        size = stage.image_batch_size if as_images and stage.frames > 1 else stage.batch_size
        groups = [clips for bucket, clips in self.training.items() if bucket.frames >= frames]
        shares = np.array([len(clips) for clips in groups], float)
        clips = groups[generator.choice(len(groups), p=shares / shares.sum())]
        chosen = [clips[i] for i in generator.integers(len(clips), size=size)]
        starts = [int(generator.integers(clip.num_frames - frames + 1)) for clip in chosen]
        mine = ranks.share(size)
        videos = self._threads.map(lambda clip, start: self._window(clip, start, frames), chosen[mine], starts[mine])
        return self._augment(np.stack(list(videos)), stage, generator)

    def held_out_batches(self, frames: int, batch_size: int) -> list[tuple[Bucket, Tensor]]:
        """The middle of each held-out clip, whole pictures, uint8 [B, T, 3, H, W], T at most `frames`."""
        batches = []
        for bucket, clips in self.held_out.items():
            length = min(bucket.frames, frames)
            videos = [clip.decode((clip.num_frames - length) // 2, length) for clip in clips]
            batches += [
                (bucket, _channels_first(np.stack(videos[first : first + batch_size])))
                for first in range(0, len(videos), batch_size)
            ]
        return batches

    def close(self) -> None:
        """Stop the decoding threads."""
        self._threads.shutdown(cancel_futures=True)

    def _window(self, clip: Clip, start: int, frames: int) -> Frames:
        cached = self._cache.get(id(clip))
        return clip.decode(start, frames) if cached is None else cached[start : start + frames]

    def _augment(self, videos: Frames, stage: VAEStage, generator: np.random.Generator) -> Tensor:
        height, width = videos.shape[2:4]
        top, left = (int(generator.integers(side - (stage.crop or side) + 1)) for side in (height, width))
        videos = videos[:, :, top : top + (stage.crop or height), left : left + (stage.crop or width)]
        if self.config.flip:
            videos = videos[:, :, :: generator.choice((-1, 1)), :: generator.choice((-1, 1))]
        return _channels_first(videos)


def _channels_first(videos: Frames) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(videos)).permute(0, 1, 4, 2, 3)


def clips_by_bucket(config: VAETrainConfig) -> dict[Bucket, list[Clip]]:
    """The clips of a run, nothing of them decoded.

    Raises:
        UserError: no manifest, no clip fits a bucket, or too few clips for a split.
    """
    buckets = config.parsed_buckets()
    groups: dict[Bucket, list[Clip]] = {}
    for row in kept_rows(read_manifest(config.manifest)):
        bucket = bucket_of(row, buckets)
        if bucket is not None:
            groups.setdefault(bucket, []).append(Clip(row, bucket))
    if not groups:
        raise UserError(f"{config.manifest}: no kept clip fits a bucket of {', '.join(config.buckets)}")
    for bucket, clips in groups.items():
        if len(clips) < 2:
            raise UserError(
                f"{config.manifest}: bucket {bucket.name} has a single clip; held-out clips need at least two"
            )
        # By hash: the split does not depend on the manifest's order, and is not one by time of recording.
        clips.sort(key=lambda clip: hashlib.blake2b(clip.row["clip_id"].encode()).digest())
    return dict(sorted(groups.items()))


def check_videos(config: VAETrainConfig, buckets: Iterable[Bucket]) -> None:
    """Refuse stages of videos where there are none.

    Raises:
        UserError: naming the stage's frames.
    """
    videos = any(bucket.frames > 1 for bucket in buckets)
    for stage in config.stages:
        if stage.frames > 1 and not videos:
            raise UserError(f"{config.manifest}: a stage has frames={stage.frames}, but no clip fills a video bucket")


def _num_held_out(num_clips: int, config: VAETrainConfig) -> int:
    return min(max(1, round(num_clips * config.held_out_share)), config.max_held_out, num_clips - 1)
