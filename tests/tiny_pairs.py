"""Small made-up shards of preference pairs, through the real writer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tiny_shards import CLIP_DIM, CLIP_SLOTS, INFO, LATENT_CHANNELS, LLM_DIM

from megatron_video.buckets import parse_bucket
from megatron_video.shard_schema import ShardSample, shard_name
from megatron_video.shards import ShardWriter, finish_dataset, write_null_text

PAIRS_INFO = dataclasses.replace(INFO, pairs=True)


def write_tiny_pairs(
    folder: Path,
    counts: dict[str, int] | None = None,
    seed: int = 0,
    equal: bool = False,
    offset: float = 0.0,
    reverse: bool = False,
) -> Path:
    """Shards with `counts` pairs per bucket: winners rise over the columns, losers fall; with `equal` they are one.

    `offset` is added to winners and taken from losers. With `reverse` winner and loser are exchanged.
    """
    counts = counts or {"17x48x48": 12, "17x48x64": 8, "1x48x48": 6}
    generator = torch.Generator().manual_seed(seed)
    for number, (name, count) in enumerate(counts.items()):
        with ShardWriter(folder, shard_name(number)) as writer:
            for index in range(count):
                sample = _pair(f"{name}-{seed}-{index}", name, generator, equal, offset)
                if reverse:
                    assert sample.loser is not None
                    sample = sample._replace(moments=sample.loser, loser=sample.moments)
                writer.add(sample, parse_bucket(name))
    write_null_text(folder, torch.randn(2, LLM_DIM, generator=generator), torch.zeros(CLIP_SLOTS, CLIP_DIM))
    finish_dataset(folder, PAIRS_INFO)
    return folder


def _pair(key: str, bucket: str, generator: torch.Generator, equal: bool, offset: float) -> ShardSample:
    frames, height, width = parse_bucket(bucket).latent_shape
    ramp = torch.linspace(-1, 1, width).expand(frames, LATENT_CHANNELS, height, width)
    winner = ramp + offset + 0.3 * torch.randn(ramp.shape, generator=generator)
    loser = winner if equal else -ramp - offset + 0.3 * torch.randn(ramp.shape, generator=generator)
    return ShardSample(
        key=key,
        moments=winner,
        llm=torch.randn(int(torch.randint(3, 9, (), generator=generator)), LLM_DIM, generator=generator),
        clip=torch.randn(CLIP_SLOTS, CLIP_DIM, generator=generator),
        metadata={"caption": key, "fps": 25.0},
        loser=loser,
    )
