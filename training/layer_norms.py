"""Sizes of activations, gradients and weights, layer by layer, on the few steps that ask for them.

There are no forward hooks: they run on every step and slow the launch of kernels, which can undo the overlap of
communication (Step-Video-T2V, arXiv 2502.10248, 6.2.2). The layer stack itself tells of its outputs while it is asked
to. Sums of squares stay on the device until one reduction over all ranks at the end of such a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_video.dit.context_parallel import TokenLayout
from training.fsdp import bare_model
from training.main_parameters import MainParameter, main_parameters
from training.optimizer import WrappedChunk

# Columns of the sums.
_ACTIVATION, _ELEMENTS, _GRADIENT, _WEIGHT = range(4)


@dataclass(frozen=True)
class LayerNorms:
    """Sizes of one step, by part of the model: patch_embedding, layers.0, ..., head."""

    activation_rms: dict[str, float]
    """Root mean square of the residual stream after the part, over all tokens and samples of the global batch."""
    grad_norm: dict[str, float]
    """2-norm of the part's gradient, before clipping."""
    param_norm: dict[str, float]
    """2-norm of the part's fp32 weights, before the update."""


class LayerProbe:
    """Measures one step, in any layout.

    Args:
        model: this rank's chunks.
        optimizer: whose gradients and fp32 weights are measured.
    """

    def __init__(self, model: list[WrappedChunk], optimizer: MegatronOptimizer) -> None:
        self._chunks = [bare_model(chunk) for chunk in model]
        count = self._chunks[0].dit_config.num_layers
        ends = ("time_conditioning", "text_projection", "patch_embedding"), ("head",)
        names = [*ends[0], *(f"layers.{number}" for number in range(count)), *ends[1]]
        self._rows = {name: row for row, name in enumerate(names)}
        self._optimizer = optimizer
        self._sums = torch.zeros(0)

    def start(self) -> None:
        """Have the layer stacks tell of their outputs until `finish`."""
        device = next(self._chunks[0].parameters()).device
        self._sums = torch.zeros(len(self._rows), 4, dtype=torch.float64, device=device)
        for chunk in self._chunks:
            chunk.activation_watch = self._see_activation

    @torch.no_grad()
    def finish(self) -> LayerNorms:
        """Add what the gradients and weights say, and reduce over all ranks; call it while gradients are ready."""
        for chunk in self._chunks:
            chunk.activation_watch = None
        self._see_parameters()
        torch.distributed.all_reduce(self._sums)
        rows = dict(zip(self._rows, self._sums.tolist(), strict=True))
        return LayerNorms(
            {name: (row[_ACTIVATION] / row[_ELEMENTS]) ** 0.5 for name, row in rows.items() if row[_ELEMENTS]},
            {name: row[_GRADIENT] ** 0.5 for name, row in rows.items()},
            {name: row[_WEIGHT] ** 0.5 for name, row in rows.items()},
        )

    @torch.no_grad()
    def _see_activation(self, name: str, x: Tensor, tokens: TokenLayout) -> None:
        chunk = self._chunks[0]
        # Without sequence parallelism every tensor-parallel rank has the same tokens.
        if not chunk.config.sequence_parallel and chunk.groups.tp.rank():
            return
        # Padding comes last, and what is there means nothing.
        real = x[: min(max(tokens.count - tokens.first, 0), len(x))]
        row = self._sums[self._rows[name]]
        # fp32 sums of bf16 values, without an fp32 copy of them.
        row[_ACTIVATION] += torch.linalg.vector_norm(real, dtype=torch.float32).double().square()
        row[_ELEMENTS] += real.numel()

    def _see_parameters(self) -> None:
        names = {
            getattr(parameter, "orig_param", parameter): name
            for chunk in self._chunks
            for name, parameter in chunk.named_parameters()
        }
        for item in main_parameters(self._optimizer):
            if item.main is not None and _counts_here(item):
                row = self._sums[self._rows[_part(names[item.parameter])]]
                row[_WEIGHT] += _square(item.main)
                row[_GRADIENT] += 0.0 if item.main.grad is None else _square(item.main.grad)


def _counts_here(item: MainParameter) -> bool:
    """Whether this rank's copy is the one that is counted, among ranks that hold the same."""
    if getattr(item.parameter, "shared", False) or not param_is_not_tensor_parallel_duplicate(item.parameter):
        return False
    # Cut over replicas, every part is somewhere else; whole, every replica has all of it.
    if item.group is not None or isinstance(item.main, DTensor):
        return True
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(to_local_if_dtensor(tensor.detach()), dtype=torch.float32).double().square()


def _part(parameter_name: str) -> str:
    first, second, *_ = parameter_name.split(".")
    return f"{first}.{second}" if first == "layers" else first
