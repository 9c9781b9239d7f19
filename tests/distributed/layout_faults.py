"""Faults that a rank can be given, each of a kind that layouts get wrong; the matrix must see every one."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import mappings

from training import ema
from training.layout_matrix import worker
from training.layout_matrix.table import LayoutCase, Workload
from training.layout_matrix.worker import Report


def train_with_fault(case: LayoutCase, workload: Workload, fault: str) -> Report:
    """What `worker.train` reports of a model with the named fault."""
    return FAULTS[fault](case, workload)


def _unmarked_norm(case: LayoutCase, workload: Workload) -> Report:
    """A norm's gradient is not summed over the ranks that each see a part of the tokens."""
    session = worker.build(case, workload)
    for chunk in session.chunks:
        for name, parameter in chunk.named_parameters():
            if name == "layers.1.norm1.weight":
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
    return session.train(worker.STEPS)


def _unreduced_context(case: LayoutCase, workload: Workload) -> Report:
    """Gradients of gathered keys and values are cut, and not summed, over the context-parallel ranks."""

    def split(group: torch.distributed.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(group.size())[group.rank()].contiguous() * group.size()

    def reduce_scatter(tensor: torch.Tensor, group: torch.distributed.ProcessGroup, *_: object, **__: object):  # noqa: ANN202
        return split(group, tensor)

    with patch.object(mappings, "_reduce_scatter_along_first_dim", reduce_scatter):
        return worker.train(case, workload)


def _misaligned_embedders(case: LayoutCase, workload: Workload) -> Report:
    """Stages cut the embedders' optimizer state at different elements, as they did before the matrix showed it."""
    wrap_as_it_is = worker.wrap_data_parallel

    def wrap(chunks: list, *arguments: object) -> list:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.shared_embedding = False
        return wrap_as_it_is(chunks, *arguments)

    with patch.object(worker, "wrap_data_parallel", wrap):
        return worker.train(case, workload)


def _same_batch(case: LayoutCase, workload: Workload) -> Report:
    """Every replica trains on the first one's micro-batches."""
    with patch.object(worker, "data_parallel_rank", lambda: 0):
        return worker.train(case, workload)


def _frozen_ema(case: LayoutCase, workload: Workload) -> Report:
    with patch.object(ema.EMA, "update", lambda _: None):
        return worker.train(case, workload)


FAULTS: dict[str, Callable[[LayoutCase, Workload], Report]] = {
    "norm not marked as sequence-parallel": _unmarked_norm,
    "key gradients not summed over context-parallel ranks": _unreduced_context,
    "embedders cut differently on every stage": _misaligned_embedders,
    "replicas train on the same data": _same_batch,
    "EMA not updated": _frozen_ema,
}
