"""Layer specs: the classes a DiT layer is made of. `local` is torch on any device, `transformer_engine` CUDA."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLPSubmodules
from torch import nn

from megatron_video.dit.attention import SDPACoreAttention
from megatron_video.dit.norms import QKRMSNorm
from megatron_video.errors import UserError


@dataclass(frozen=True)
class LayerSpec:
    """The parts of one DiT layer."""

    self_attention: SelfAttentionSubmodules
    cross_attention: CrossAttentionSubmodules
    mlp: MLPSubmodules
    qk_norm: type[nn.Module]
    replicated_input_column_linear: type[nn.Module]
    """Column-parallel linear for inputs that every tensor-parallel rank holds whole (text, time)."""


def get_layer_spec(transformer_impl: Literal["local", "transformer_engine"]) -> LayerSpec:
    """The spec by name.

    Raises:
        UserError: Transformer Engine was asked for and is not installed, or there is no CUDA.
    """
    if transformer_impl == "local":
        return _spec(ColumnParallelLinear, RowParallelLinear, SDPACoreAttention, SDPACoreAttention)
    if not HAVE_TE or not torch.cuda.is_available():
        raise UserError(
            "transformer_impl='transformer_engine' needs CUDA and the package transformer-engine "
            "(pip install megatron-video[gpu]); without them use transformer_impl='local'"
        )
    from megatron_video.dit import te

    return _spec(te.TEColumnParallelLinear, te.TERowParallelLinear, te.SelfCoreAttention, te.TextCoreAttention)


def without_sequence_parallel(linear: type[nn.Module]) -> type[nn.Module]:
    """A column-parallel linear for inputs that are not cut along the sequence; its input gradient is all-reduced."""

    class ReplicatedInputLinear(linear):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.sequence_parallel = False
            super().__init__(*args, config=config, **kwargs)

    ReplicatedInputLinear.__name__ = f"ReplicatedInput{linear.__name__}"
    return ReplicatedInputLinear


def _spec(column: Any, row: Any, self_core: Any, cross_core: Any) -> LayerSpec:
    text_column = without_sequence_parallel(column)
    return LayerSpec(
        self_attention=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=self_core,
            linear_proj=row,
            q_layernorm=QKRMSNorm,
            k_layernorm=QKRMSNorm,
        ),
        cross_attention=CrossAttentionSubmodules(
            linear_q=column, linear_kv=text_column, core_attention=cross_core, linear_proj=row
        ),
        mlp=MLPSubmodules(linear_fc1=column, linear_fc2=row),
        qk_norm=QKRMSNorm,
        replicated_input_column_linear=text_column,
    )
