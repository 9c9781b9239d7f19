"""Buckets: the few sizes (frames x height x width) that samples are brought to, so that a batch is one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_video.errors import UserError
from megatron_video.flops import LatentShape, latent_shape
from megatron_video.manifest import Row


class CropBox(NamedTuple):
    """A rectangle of the upright picture, in pixels."""

    x: int
    y: int
    width: int
    height: int


class Bucket(NamedTuple):
    """Size of a sample in frames and pixels."""

    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """Such as "17x48x64": frames x height x width."""
        return "x".join(map(str, self))

    @property
    def latent_shape(self) -> LatentShape:
        """Latent frames, rows and columns of a sample in this bucket."""
        return latent_shape(*self)


def parse_bucket(text: str) -> Bucket:
    """Read "17x48x64" (frames x height x width).

    Raises:
        UserError: not three whole numbers, or sizes that the Video-VAE cannot encode.
    """
    parts = text.strip().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UserError(f"bucket {text!r} is not FRAMESxHEIGHTxWIDTH, such as 17x48x64")
    bucket = Bucket(*map(int, parts))
    try:
        latent_shape(*bucket)
    except UserError as error:
        raise UserError(f"bucket {text.strip()}: {error}") from None
    return bucket


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Read a comma-separated list of buckets; each once, in ascending order."""
    return tuple(sorted({parse_bucket(part) for part in text.split(",")}))


def choose_bucket(
    buckets: Sequence[Bucket], num_frames: int, height: int, width: int, is_image: bool = False
) -> Bucket | None:
    """The bucket with most frames that the clip fills, and among those the nearest aspect ratio (larger one if equal).

    An image goes to a bucket of one frame only, a video never does. None if nothing fits.
    """
    # A video of a few frames is no image: it would teach stills that are blurred by motion.
    fitting = [b for b in buckets if (b.frames == 1) == is_image and b.frames <= num_frames]
    if not fitting:
        return None
    most = max(bucket.frames for bucket in fitting)
    # Logarithms: 2:1 is as far from square as 1:2.
    aspect = math.log(width / height)

    def distance(bucket: Bucket) -> tuple[float, int]:
        # Rounded, so that equal aspect ratios compare equal and the area decides.
        return round(abs(math.log(bucket.width / bucket.height) - aspect), 9), -bucket.height * bucket.width

    return min((bucket for bucket in fitting if bucket.frames == most), key=distance)


def bucket_of(row: Row, buckets: Sequence[Bucket]) -> Bucket | None:
    """Bucket of a clip by its length and the aspect ratio inside its black borders."""
    box = crop_of(row)
    width, height = (box.width, box.height) if box else (row["width"], row["height"])
    return choose_bucket(buckets, row["end_frame"] - row["start_frame"], height, width, row["is_image"])


def crop_of(row: Row) -> CropBox | None:
    """The box inside black borders; None if there are none, or the clip is not tagged."""
    # Null where `tag` was not run: then nothing is known to cut off.
    if not row["border_share"]:
        return None
    return CropBox(row["crop_x"], row["crop_y"], row["crop_width"], row["crop_height"])
