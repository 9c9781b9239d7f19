"""Small made-up shards for tests of training, through the real writer."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_video.buckets import parse_bucket
from megatron_video.shard_schema import DatasetInfo, ShardSample, shard_name
from megatron_video.shards import ShardWriter, finish_dataset, write_null_text

LATENT_CHANNELS, LLM_DIM, CLIP_DIM, CLIP_SLOTS = 4, 16, 8, 5

MODEL_OVERRIDES = [
    "model.num_layers=2",
    "model.num_attention_heads=2",
    "model.attention_head_dim=16",
    f"model.in_channels={LATENT_CHANNELS}",
    f"model.out_channels={LATENT_CHANNELS}",
    f"model.caption_channels=[{LLM_DIM},{CLIP_DIM}]",
]


INFO = DatasetInfo("vae", "text", LATENT_CHANNELS, LLM_DIM, CLIP_DIM, CLIP_SLOTS)


def write_tiny_shards(
    folder: Path,
    counts: dict[str, int] | None = None,
    seed: int = 0,
    learnable: bool = False,
    source: str = "",
    info: DatasetInfo = INFO,
) -> Path:
    """Shards with `counts` samples per bucket (17x48x48, 17x48x64 and 1x48x48 unless told otherwise).

    Latents are noise, or with `learnable` a ramp over channels and columns, the same in every bucket. Keys begin with
    `source`, so that two folders do not share their source videos.
    """
    counts = counts or {"17x48x48": 20, "17x48x64": 12, "1x48x48": 9}
    generator = torch.Generator().manual_seed(seed)
    for number, (name, count) in enumerate(counts.items()):
        with ShardWriter(folder, shard_name(number)) as writer:
            for index in range(count):
                sample = _sample(f"{source}{name}-{seed}-{index}", name, generator, info)
                writer.add(_with_ramp(sample) if learnable else sample, parse_bucket(name))
    write_null_text(
        folder, torch.randn(2, info.llm_dim, generator=generator), torch.zeros(info.clip_tokens, info.clip_dim)
    )
    finish_dataset(folder, info)
    return folder


def _with_ramp(sample: ShardSample) -> ShardSample:
    frames, _, height, width = sample.moments.shape
    ramp = torch.linspace(-1, 1, LATENT_CHANNELS)[:, None] + torch.linspace(-1, 1, width)
    mean = ramp[None, :, None].expand(frames, LATENT_CHANNELS, height, width)
    # A narrow posterior: what is drawn from it hardly differs from the mean.
    return sample._replace(moments=torch.cat([mean, torch.full_like(mean, -6.0)], dim=1))


def _sample(key: str, bucket: str, generator: torch.Generator, info: DatasetInfo) -> ShardSample:
    frames, height, width = parse_bucket(bucket).latent_shape
    tokens = int(torch.randint(3, 9, (), generator=generator))
    return ShardSample(
        key=key,
        moments=torch.randn(frames, 2 * LATENT_CHANNELS, height, width, generator=generator),
        llm=torch.randn(tokens, info.llm_dim, generator=generator),
        clip=torch.randn(info.clip_tokens, info.clip_dim, generator=generator),
        metadata={"caption": key, "fps": 25.0},
    )
