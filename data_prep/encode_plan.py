"""Which clip goes into which bucket and shard: decided before anything is encoded, from the manifest alone.

So a stopped run knows which shards are missing, and a second run of the same plan makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_video.buckets import Bucket, bucket_of
from megatron_video.errors import UserError
from megatron_video.manifest import Row, dropped
from megatron_video.shard_schema import shard_name

STAGE = "encode"


@dataclass(frozen=True)
class PlannedShard:
    """Clips of one bucket that go into one tar."""

    name: str
    bucket: Bucket
    rows: tuple[Row, ...]


def plan_shards(
    rows: Sequence[Row], buckets: Sequence[Bucket], samples_per_shard: int, kinds: Sequence[str] = ()
) -> tuple[list[PlannedShard], list[Row]]:
    """Shards, and, as dropped rows, those that no bucket holds or that have no caption, of `kinds` or plain.

    Order within a bucket is the manifest's.

    Raises:
        UserError: a clip occurs twice, or `samples_per_shard` is not positive.
    """
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard} must be at least 1")
    _refuse_duplicates(rows)
    # One bucket a shard: whoever reads a tar from end to end can batch as it comes.
    by_bucket: dict[Bucket, list[Row]] = {bucket: [] for bucket in sorted(buckets)}
    unplaced = []
    columns = ("caption", *(f"caption_{kind}" for kind in kinds))
    for row in rows:
        bucket = bucket_of(row, buckets)
        if not any((row[column] or "").strip() for column in columns):
            # The empty text is what guidance moves away from: to train a clip on it must not happen by mistake.
            unplaced.append(dropped(row, STAGE, "no caption: `megatron-video data caption` writes them"))
        elif bucket is None:
            unplaced.append(dropped(row, STAGE, _no_bucket(row, buckets)))
        else:
            by_bucket[bucket].append({**row, "bucket": bucket.name})
    groups = [
        (bucket, tuple(members[start : start + samples_per_shard]))
        for bucket, members in by_bucket.items()
        for start in range(0, len(members), samples_per_shard)
    ]
    return [PlannedShard(shard_name(n), bucket, group) for n, (bucket, group) in enumerate(groups)], unplaced


def window_of(row: Row, bucket: Bucket) -> tuple[int, int]:
    """First frame and frame after the last one that are encoded: the middle of the clip, at its own frame rate."""
    start = row["start_frame"] + (row["end_frame"] - row["start_frame"] - bucket.frames) // 2
    return start, start + bucket.frames


def _no_bucket(row: Row, buckets: Sequence[Bucket]) -> str:
    kind = "an image" if row["is_image"] else f"a video of {row['end_frame'] - row['start_frame']} frames"
    return f"no bucket: {kind} fits none of {', '.join(bucket.name for bucket in buckets)}"


def _refuse_duplicates(rows: Sequence[Row]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row["clip_id"] in seen:
            raise UserError(
                f"clip {row['clip_id']} occurs twice in the manifest: {seen[row['clip_id']]} and {row['source']}"
            )
        seen[row["clip_id"]] = row["source"]
