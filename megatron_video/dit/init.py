"""Initialisation for training from scratch; the reference has none (its `with_empty_init` leaves memory as it is).

| parameters | values | why |
|---|---|---|
| linears of the blocks | N(0, std), std = sqrt(2 / (5 D)) | "small init": 0.008 at D = 6144 |
| output linears of self-attention and feed-forward | std / sqrt(2 L) | depth-scaled, megatron-core's scaled init |
| cross-attention output linear | 0 | the branch has no gate: it starts closed like the gated ones |
| adaLN projection, block tables, head table | 0 | adaLN-zero: gates start at 0, every block starts as the identity |
| head linear | 0 | the first prediction is 0, the velocity's mean |
| patch, time and text embedders | N(0, 1 / fan_in) | unit variance in, unit variance out |
| biases 0, norm weights 1 | | |

Each tensor is drawn whole, in fp32 on the CPU, from a generator keyed by (seed, its name in the whole model), and
then cut for this rank: the values are the same under every layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_video.fp8 import set_parameter

_ZERO = ("modulation_linear.weight", "modulation_table", "cross_attention.linear_proj.weight", "head.projection.weight")
_DEPTH_SCALED = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_FAN_IN = ("patch_embedding.", "time_conditioning.", "text_projection.")


def initialize_parameters(model: nn.Module, config: TransformerConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fill every parameter of `model` (see the module's table)."""
    for name, parameter in model.named_parameters():
        dimension = int(getattr(parameter, "partition_dim", -1)) if tp_size > 1 else -1
        if dimension < 0 or not getattr(parameter, "tensor_model_parallel", False):
            dimension = -1
        shape = list(parameter.shape)
        if dimension >= 0:
            shape[dimension] *= tp_size
        value = initial_value(name, shape, config, seed)
        if dimension >= 0:
            value = value.chunk(tp_size, dim=dimension)[tp_rank]
        set_parameter(parameter, value)


def initial_value(name: str, shape: list[int], config: TransformerConfig, seed: int) -> Tensor:
    """A whole parameter of the model before training, fp32 (see the module's table); `name` in the whole model."""
    if name.endswith(_ZERO) or name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    value = torch.empty(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(seed, name))
        _method(name, value, config)(value)
    return value


def _method(name: str, value: Tensor, config: TransformerConfig) -> Callable[[Tensor], object]:
    if name.startswith(_FAN_IN):
        std = value[0].numel() ** -0.5
        return lambda tensor: nn.init.normal_(tensor, std=std)
    method = config.output_layer_init_method if name.endswith(_DEPTH_SCALED) else config.init_method
    assert method is not None
    return method


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
