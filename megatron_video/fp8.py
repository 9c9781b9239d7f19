"""Linear layers of the blocks in FP8 by Transformer Engine: the recipe, what it needs, and where it applies.

Only the layers of the DiT run in FP8. Embedders, the adaLN projection, norms and the head stay in bf16: they are built
and run outside the contexts given here (`VideoDiT`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_video.config_io import config_dataclass

Capability = tuple[int, int]


@dataclass(frozen=True)
class RecipeNeeds:
    """What one recipe asks of the machine and of the shapes (Transformer Engine 2.11, quantization.py and utils.py)."""

    capability: Capability
    """Oldest compute capability."""
    below: Capability | None
    """First compute capability that is too new; None where there is none."""
    cuda: Capability | None
    """Oldest CUDA version of torch; None where compute capability decides alone."""
    multiple: int
    """Rows and columns of every matrix, on one rank, are multiples of it: 16 bytes for the matrix product in both
    directions (its check of 8 rows lets the weight gradient fail), else the side of the block that shares a scale."""
    attention: Capability | None
    """Oldest compute capability with FP8 attention kernels that train; None where the recipe has none."""


RECIPES: dict[str, RecipeNeeds] = {
    "delayed": RecipeNeeds((8, 9), None, None, 16, attention=(9, 0)),
    "tensorwise": RecipeNeeds((8, 9), None, None, 16, attention=(10, 0)),
    "blockwise": RecipeNeeds((9, 0), None, (12, 9), 128, attention=None),
    "mxfp8": RecipeNeeds((10, 0), (12, 0), None, 32, attention=None),
}


@config_dataclass
class Fp8Config:
    """FP8 in the linear layers of the blocks (needs transformer_impl=transformer_engine and bf16 precision)."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """How numbers are scaled into FP8: `delayed` by the largest magnitudes of earlier steps, `tensorwise` by this
    tensor's own, `blockwise` by 128 x 128 weights and 1 x 128 activations, `mxfp8` by 32 numbers (Blackwell). Null: no
    FP8."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """`hybrid`: gradients in e5m2 (more range), the rest in e4m3 (more digits); `e4m3`: everything."""
    first_layers_bf16: int = 0
    """Blocks at the start of the model that stay in bf16."""
    last_layers_bf16: int = 0
    """Blocks at its end that stay in bf16."""
    param_gather: bool = False
    """Keep the blocks' weights in FP8 only, beside the optimizer's fp32 copies, and gather them in FP8; needs
    parallel.use_distributed_optimizer."""
    dot_product_attention: bool = False
    """Attention itself in FP8 too; experimental in Transformer Engine."""
    amax_history_len: int = 1024
    """For `delayed`: steps over which largest magnitudes are remembered."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """For `delayed`: the largest of them or the last."""
    margin: int = 0
    """For `delayed`: powers of two kept free above the largest magnitude."""

    def __post_init__(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            ValueError: naming the fields, the values and what is allowed.
        """
        for name in ("first_layers_bf16", "last_layers_bf16", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.amax_history_len < 1:
            raise ValueError(f"amax_history_len={self.amax_history_len} must be at least 1")

    @property
    def needs(self) -> RecipeNeeds | None:
        """What the recipe needs; None without FP8."""
        return None if self.recipe is None else RECIPES[self.recipe]

    def megatron_settings(self) -> dict[str, Any]:
        """The fields of megatron-core's TransformerConfig that say the same."""
        if self.recipe is None:
            return {}
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_param": self.param_gather,
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "fp8_dot_product_attention": self.dot_product_attention,
            "first_last_layers_bf16": bool(self.first_layers_bf16 or self.last_layers_bf16),
            "num_layers_at_start_in_bf16": self.first_layers_bf16,
            "num_layers_at_end_in_bf16": self.last_layers_bf16,
        }


def token_multiple(config: TransformerConfig) -> int:
    """Tokens of one rank, of the video and of the text, are padded to a multiple of it."""
    return RECIPES[config.fp8_recipe].multiple if config.fp8 else 1


def building_layer(config: TransformerConfig, layer: int) -> AbstractContextManager[Any]:
    """In which block `layer` of the whole model, from 0, is built: weights in FP8 where `param_gather` says so."""
    return get_fp8_context(config, layer, is_init=True)


def running_layers(config: TransformerConfig) -> AbstractContextManager[Any]:
    """Around all blocks of a forward pass. Delayed scaling exchanges its magnitudes once, where this ends."""
    return get_fp8_context(config) if config.fp8 and config.fp8_recipe == "delayed" else nullcontext()


def running_layer(config: TransformerConfig, layer: int) -> AbstractContextManager[Any]:
    """Around block `layer` of the whole model, from 0, also where it is computed again for backward."""
    delayed = config.fp8_recipe == "delayed"
    return nullcontext() if not config.fp8 or delayed else get_fp8_context(config, layer)


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into a parameter, and into the copy that an FP8 one keeps for the optimizer's fp32 weights."""
    parameter.copy_(value)
    # Transformer Engine saw the weight only before it was initialised.
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val = value.detach().to("cpu", parameter.dtype)
