"""What one DiT block keeps for backward, counted where autograd keeps it (paper 6.2.3: modulation is not repeated)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.dit.context_parallel import TokenLayout
from megatron_video.dit.layer import DiTLayer
from megatron_video.dit.rope import build_rope
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel

HEADS, HEAD_DIM, TEXT = 4, 16, 5
WIDTH, FFN = HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM
FP32 = 4


@pytest.fixture(scope="module")
def layer() -> Iterator[DiTLayer]:
    destroy_parallel(keep_distributed=True)
    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=1, device_info=device.initialize())
    config = DiTConfig(num_layers=1, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, caption_channels=24)
    (model,) = build_dit(config, parallel, torch.float32, device=torch.device("cpu"))
    yield model.layers["0"]
    destroy_parallel(keep_distributed=True)


# Numbers kept for one token, in plain fp32 torch. On a GPU the kernels leave out what is marked k.
A_TOKEN = {
    "norm 1: input, k normalised, modulated (input of the projection)": 3 * WIDTH,
    "query, key and value as projected": 3 * WIDTH,
    "k query and key normalised, not yet weighted": 2 * WIDTH,
    "query and key rotated, attention output, its projection (for the gate)": 4 * WIDTH,
    "cross-attention: input, query as projected, k normalised, weighted, attention output": 5 * WIDTH,
    "norm 2: input, k normalised, modulated": 3 * WIDTH,
    "feed-forward: before and after GELU, output (for the gate)": 2 * FFN + WIDTH,
    "a mean and deviation a norm, a deviation a head, a log-sum a head and attention": 4 + 3 * HEADS + 2 * HEADS,
}
A_TEXT_TOKEN = {
    "input, key and value as projected, key normalised and weighted": 5 * WIDTH,
    "deviation a head": HEADS,
}
# The six modulations, and 1 + scale of two: nothing a token.
MODULATION = 8 * WIDTH


def kept_numbers(layer: DiTLayer, tokens: int, batch: int) -> float:
    """fp32 numbers in all storages that backward of one block holds, weights and rotary tables left out."""
    rope = build_rope((tokens, 1, 1), (8, 4, 4), torch.float32, torch.device("cpu"), False)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), rope.cos, rope.sin)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(tokens, batch, WIDTH, requires_grad=True)
    modulation = torch.randn(batch, 6, WIDTH, requires_grad=True)
    text = torch.randn(TEXT, batch, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x, modulation, text, None, None, TokenLayout(rope, tokens, 0))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known) / FP32


@pytest.mark.parametrize("batch", [1, 3])
def test_backward_of_a_block_keeps_the_modulation_once_and_not_once_a_token(layer: DiTLayer, batch: int) -> None:
    few, many = (kept_numbers(layer, tokens, batch) / batch for tokens in (24, 40))
    assert (many - few) / 16 == sum(A_TOKEN.values())
    assert few - 24 * sum(A_TOKEN.values()) == TEXT * sum(A_TEXT_TOKEN.values()) + MODULATION
