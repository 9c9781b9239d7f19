"""Which layouts are measured beside the planner, on what model and data: all of it data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_video.buckets import parse_bucket
from megatron_video.config_io import load_config
from megatron_video.shard_schema import DatasetInfo, ShardSample, shard_name
from megatron_video.shards import ShardWriter, finish_dataset, write_null_text
from training.config import PretrainConfig
from training.local_ranks import Device

CHANNELS, LLM_CHANNELS, CLIP_CHANNELS = 16, 64, 48
LLM_TOKENS, CLIP_TOKENS = 48, 16
TEXT_TOKENS = LLM_TOKENS + CLIP_TOKENS
SAMPLES = 8


@dataclass(frozen=True)
class Size:
    """Of the model and its samples: large enough that activations outweigh what a machine adds of its own."""

    bucket: str
    """Frames x height x width."""
    heads: int
    head_dim: int
    """Channels of a head."""


SIZES: dict[Device, Size] = {
    "cpu": Size("34x128x256", 4, 32),
    "cuda": Size("68x288x512", 16, 96),
}


@dataclass(frozen=True)
class MeasuredLayout:
    """A row of the table."""

    name: str
    overrides: Sequence[str] = ()
    """Of the run's configuration."""
    ranks: int = 1
    precision: str = "fp32"
    samples: int = 1
    """Of a micro-batch."""
    default: bool = field(default=False, kw_only=True)
    """Among the few of the default test suite."""


def _parallel(**fields: object) -> list[str]:
    return [f"parallel.{name}={'true' if value is True else value}" for name, value in fields.items()]


TP2, TP4 = _parallel(tensor_model_parallel_size=2), _parallel(tensor_model_parallel_size=4)
SP = _parallel(sequence_parallel=True)
PP2, PP4 = _parallel(pipeline_model_parallel_size=2), _parallel(pipeline_model_parallel_size=4)
VPP2 = _parallel(virtual_pipeline_model_parallel_size=2)
CP2, CP4 = _parallel(context_parallel_size=2), _parallel(context_parallel_size=4)
GATHER = _parallel(cp_comm_type="all_gather")
ZERO1 = _parallel(use_distributed_optimizer=True)
OVERLAP = _parallel(overlap_grad_reduce=True, overlap_param_gather=True)
FSDP = _parallel(use_megatron_fsdp=True)
FSDP2 = [*FSDP, *_parallel(data_parallel_sharding_strategy="optim_grads")]
FULL = _parallel(recompute_granularity="full")
FIRST2 = [*FULL, *_parallel(recompute_num_layers=2)]
SELECTIVE = _parallel(recompute_granularity="selective")
ALL_PARTS = [*SELECTIVE, *_parallel(recompute_modules="[core_attn,cross_attention,mlp]")]
EMA = ["ema.decay=0.99"]

LAYOUTS: tuple[MeasuredLayout, ...] = (
    MeasuredLayout("one rank"),
    MeasuredLayout("one rank", precision="bf16"),
    MeasuredLayout("EMA", EMA, precision="bf16"),
    MeasuredLayout("micro-batches of 2", samples=2),
    MeasuredLayout("recompute all", FULL),
    MeasuredLayout("recompute 2 layers", FIRST2, precision="bf16", default=True),
    MeasuredLayout("recompute core_attn + mlp", SELECTIVE),
    MeasuredLayout("recompute all parts", ALL_PARTS, precision="bf16"),
    MeasuredLayout("TP2", TP2, 2),
    MeasuredLayout("TP2 SP", [*TP2, *SP], 2, "bf16", default=True),
    MeasuredLayout("TP4 SP", [*TP4, *SP], 4),
    MeasuredLayout("TP2 SP recompute all", [*TP2, *SP, *FULL], 2, "bf16"),
    MeasuredLayout("CP2 a2a", CP2, 2),
    MeasuredLayout("CP2 all_gather", [*CP2, *GATHER], 2, "bf16"),
    MeasuredLayout("CP4 all_gather", [*CP4, *GATHER], 4),
    MeasuredLayout("CP4 all_gather recompute core_attn + mlp", [*CP4, *GATHER, *SELECTIVE], 4),
    MeasuredLayout("TP2 SP CP2 a2a", [*TP2, *SP, *CP2], 4),
    MeasuredLayout("PP2", PP2, 2),
    MeasuredLayout("PP4", PP4, 4, "bf16"),
    MeasuredLayout("PP2 VPP2", [*PP2, *VPP2], 2, default=True),
    MeasuredLayout("PP2 VPP2 recompute all", [*PP2, *VPP2, *FULL], 2, "bf16"),
    MeasuredLayout("TP2 SP PP2", [*TP2, *SP, *PP2], 4),
    MeasuredLayout("PP2 CP2 a2a", [*PP2, *CP2], 4, "bf16"),
    MeasuredLayout("DP2", ranks=2),
    MeasuredLayout("DP2 ZeRO-1 overlap, EMA", [*ZERO1, *OVERLAP, *EMA], 2, "bf16", default=True),
    MeasuredLayout("TP2 SP DP2 ZeRO-1, EMA", [*TP2, *SP, *ZERO1, *EMA], 4, "bf16"),
    MeasuredLayout("PP2 DP2 ZeRO-1", [*PP2, *ZERO1], 4),
    MeasuredLayout("DP2 FSDP", FSDP, 2),
    MeasuredLayout("DP2 FSDP", FSDP, 2, "bf16"),
    MeasuredLayout("DP2 FSDP recompute all, EMA", [*FSDP, *FULL, *EMA], 2, "bf16"),
    MeasuredLayout("DP2 FSDP optim_grads", FSDP2, 2, "bf16"),
)


def run_config(layout: MeasuredLayout, size: Size, folder: Path) -> PretrainConfig:
    """Two steps on the shards in `folder`, of two micro-batches a replica, or of four where stages have to fill."""
    parallel = load_config(PretrainConfig, None, layout.overrides).parallel
    micro_batches = 2 if parallel.pipeline_model_parallel_size == 1 else 4
    replicas = layout.ranks // parallel.model_parallel_size
    return load_config(
        PretrainConfig,
        None,
        [
            f"run.output_dir={folder / 'run'}",
            f"data.shards=[{folder / 'shards'}]",
            f"data.buckets=[{size.bucket}]",
            "data.text_dropout=0.0",
            f"model.num_attention_heads={size.heads}",
            f"model.attention_head_dim={size.head_dim}",
            "model.num_layers=4",
            f"model.in_channels={CHANNELS}",
            f"model.out_channels={CHANNELS}",
            f"model.caption_channels=[{LLM_CHANNELS},{CLIP_CHANNELS}]",
            f"training.precision={layout.precision}",
            # The optimizer's moments are there from the second step on.
            "training.steps=2",
            "optimizer.warmup_steps=0",
            *layout.overrides,
            f"data.micro_batch_size={layout.samples}",
            f"data.global_batch_size={micro_batches * layout.samples * replicas}",
        ],
    )


def write_shards(folder: Path, size: Size) -> None:
    """`folder`/shards: samples of noise, all with texts of one length."""
    generator = torch.Generator().manual_seed(0)
    bucket = parse_bucket(size.bucket)
    frames, height, width = bucket.latent_shape
    shards = folder / "shards"
    with ShardWriter(shards, shard_name(0)) as writer:
        for number in range(SAMPLES):
            moments = torch.randn(frames, 2 * CHANNELS, height, width, generator=generator)
            llm = torch.randn(LLM_TOKENS, LLM_CHANNELS, generator=generator)
            clip = torch.randn(CLIP_TOKENS, CLIP_CHANNELS, generator=generator)
            writer.add(ShardSample(f"noise {number}", moments, llm, clip, {"caption": "noise", "fps": 24.0}), bucket)
    write_null_text(shards, torch.zeros(1, LLM_CHANNELS), torch.zeros(CLIP_TOKENS, CLIP_CHANNELS))
    finish_dataset(shards, DatasetInfo("noise", "noise", CHANNELS, LLM_CHANNELS, CLIP_CHANNELS, CLIP_TOKENS))
