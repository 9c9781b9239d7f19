"""What a small model keeps for its backward pass: measured where autograd keeps it, and as the planner has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_video.device import initialize
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.planner.activations import checkpoint_bytes, head_bytes, kept_bytes, patch_bytes, text_bytes
from training.planner.shape import ModelShape
from training.planner.work import MicroBatch

TINY = DiTConfig(num_layers=4, num_attention_heads=4, attention_head_dim=16, caption_channels=[24, 20])
FRAMES, SIDE = 6, 8
TOKENS, TEXT, CLIP = FRAMES * SIDE * SIDE, 12, 4
FP32 = 4


def predicted_bytes(parallel: ParallelConfig, samples: int) -> float:
    """By the planner, on one rank, in plain fp32 torch."""
    shape, batch = ModelShape.of(TINY), MicroBatch(samples, TOKENS, TEXT)
    again = 0
    if parallel.recompute_granularity == "full":
        again = parallel.recompute_num_layers or TINY.num_layers
    blocks = again * checkpoint_bytes(shape, batch, parallel, FP32)
    blocks += (TINY.num_layers - again) * kept_bytes(shape, batch, parallel, FP32, fused=False)
    ends = patch_bytes(shape, batch, FP32) + head_bytes(shape, batch, parallel, FP32)
    return blocks + text_bytes(shape, batch, FP32) + ends


def kept_by_autograd(parallel: ParallelConfig, samples: int) -> int:
    """Bytes of all storages that backward holds on this rank, without parameters and rotary tables.

    All ranks of the layout call it together.
    """
    (model,) = build_dit(TINY, parallel, torch.float32, device=torch.device("cpu"))
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latents = torch.randn(samples, FRAMES, TINY.in_channels, SIDE, SIDE)
    llm, clip = torch.randn(samples, TEXT - CLIP, 24), torch.randn(samples, CLIP, 20)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (model(latents, torch.rand(samples), llm, clip) - latents).square().sum()
    assert loss.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    rotary = {place for place, tensor in kept.items() if tensor.dim() == 4 and tensor.shape[1:3] == (1, 1)}
    others = (tensor for place, tensor in kept.items() if place not in parameters | rotary)
    return sum(tensor.untyped_storage().nbytes() for tensor in others)


def kept_on_this_rank(cut: dict[str, Any], recomputed: list[dict[str, Any]], samples: int) -> list[int]:
    """The same under layouts that differ in what is recomputed, on a rank of a pool."""
    initialize_parallel(ParallelConfig(**cut), seed=1, device_info=initialize())
    try:
        return [kept_by_autograd(ParallelConfig(**cut, **again), samples) for again in recomputed]
    finally:
        destroy_parallel(keep_distributed=True)
