"""The reference's velocity errors: a pass over all draws of a run before its first step, or one in every step.

Neither keeps a second model on the device. The pass uses the run's own model before it takes its first weights; in a
step, the reference's weights change places with the trained ones, which wait in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from megatron_video.dit import VideoDiT
from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files
from megatron_video.parallel import data_parallel_rank, data_parallel_size
from training import checkpoint
from training.averaged_weights import finish_parameter_gathers
from training.balance import PlannedBatch
from training.config import PretrainConfig
from training.data import Batch
from training.data_plan import DataPlan
from training.optimizer import WrappedChunk
from training.preference_data import PairBatch, PairBatchBuilder, pair_errors
from training.reference_errors import FOLDER, ReferenceErrors
from training.sample_videos import decided_by_rank_0
from training.train_step import LossFunction, predict, run_schedule

# Steps of one file, after which a pass that is killed goes on.
_STEPS_PER_BLOCK = 50


@dataclass(frozen=True)
class Reference:
    """Which weights are the reference."""

    checkpoint: Path
    averaged: bool

    @classmethod
    def of(cls, config: PretrainConfig) -> Reference:
        """The one of a configuration with a `dpo` group.

        Raises:
            UserError: no complete checkpoint there.
        """
        assert config.dpo is not None
        where = config.dpo.reference_weights or config.run.initial_weights
        assert where is not None
        averaged = config.dpo.reference_from_ema
        return cls(checkpoint.find_checkpoint(where), config.run.initial_from_ema if averaged is None else averaged)

    def fingerprint(self) -> str:
        """Equal for equal weights of one checkpoint, wherever it lies."""
        files = sorted(self.checkpoint.glob("*.distcp"))
        return f"{self.checkpoint.name} {fingerprint_files(files)}{' averaged' if self.averaged else ''}"

    def load_into(self, chunks: Sequence[Any]) -> None:
        """Give the model the reference's weights; all ranks call it together.

        Raises:
            UserError: a model of other sizes, or no averages where they are asked for.
        """
        checkpoint.load_model_weights(self.checkpoint, list(chunks), averaged=self.averaged)


def open_reference_errors(
    config: PretrainConfig, reference_fingerprint: str, data_fingerprint: str, plan: DataPlan
) -> ReferenceErrors:
    """The run's stored errors, those of this reference, these data and this noise.

    Raises:
        UserError: the run's folder holds others; names what differs.
    """
    identity = {
        "reference": reference_fingerprint,
        "data set": data_fingerprint,
        "seed": config.run.seed,
        "stage": config.run.stage,
        "time density": repr(config.flow),
        "text dropout": config.data.text_dropout,
        "precision": config.training.precision,
        "order": plan.identity()["scheme"],
    }
    return ReferenceErrors(Path(config.run.output_dir) / FOLDER, identity)


def complete_reference_errors(
    config: PretrainConfig,
    store: ReferenceErrors,
    plan: DataPlan,
    builder: PairBatchBuilder,
    chunks: list[VideoDiT],
    say: Callable[[str], None],
) -> None:
    """Compute the errors of all steps that have none yet; the model then has the reference's weights.

    All ranks call it together. A pass that is killed goes on with the block of steps it was in.
    """
    first, steps = decided_by_rank_0(lambda: store.steps_done), config.training.steps
    if first >= steps:
        return
    say(f"reference errors: steps {first} to {steps} are computed once, before training; kept in {store.folder}")
    Reference.of(config).load_into(chunks)
    starts = range(first, steps, _STEPS_PER_BLOCK)
    for start in tqdm(starts, desc="reference", unit="block", disable=None if dist.get_rank() == 0 else True):
        end = min(start + _STEPS_PER_BLOCK, steps)
        found = [_step_errors(plan.rank_share(step, *_replica()), builder, chunks) for step in range(start, end)]
        _write_block(store, start, end, found)
    dist.barrier()
    store.reload()


class SwappedReference:
    """The reference's weights in host memory, for runs that compute its errors in every step.

    Args:
        chunks: the model with the reference's weights, before it takes its own.
    """

    def __init__(self, chunks: Sequence[VideoDiT]) -> None:
        pinned = torch.cuda.is_available()
        self._held = [
            parameter.detach().to("cpu", copy=True).pin_memory() if pinned else parameter.detach().clone()
            for chunk in chunks
            for parameter in chunk.parameters()
        ]

    def with_errors(self, model: list[WrappedChunk], batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step with the reference's errors; the weights are the trained ones again after it."""
        with self.in_place(model):
            errors = forward_errors(batches, model)
        return [
            replace(batch, reference_errors=found) if isinstance(batch, PairBatch) else batch
            for batch, found in zip(batches, errors, strict=True)
        ]

    @contextmanager
    def in_place(self, model: list[WrappedChunk]) -> Iterator[None]:
        """Within it the model computes with the reference's weights; needs room for one more tensor only."""
        finish_parameter_gathers(model)
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: list[WrappedChunk]) -> None:
        parameters = (parameter for chunk in model for parameter in chunk.parameters())
        for parameter, held in zip(parameters, self._held, strict=True):
            trained = parameter.detach().to("cpu", copy=True)
            parameter.copy_(held)
            held.copy_(trained)


@contextmanager
def stored_reference(reference: Reference, model: list[WrappedChunk]) -> Iterator[None]:
    """Within it the model computes with the reference's weights, read from its checkpoint; the trained ones wait in
    host memory. For what happens seldom."""
    finish_parameter_gathers(model)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    trained = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    reference.load_into(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, held in zip(parameters, trained, strict=True):
                parameter.copy_(held)


@torch.no_grad()
def forward_errors(batches: Sequence[Batch], model: Sequence[Any]) -> list[Tensor | None]:
    """Errors [2, b] of micro-batches of pairs under the model's weights; None but on the last pipeline stage."""
    outputs = run_schedule(
        _forward_step,
        list(model),
        tee(enumerate(batches), len(model)),
        len(batches),
        max(batch.latents[0, :, 0].numel() for batch in batches),
        max(len(batch.latents) for batch in batches),
        forward_only=True,
    )
    found: list[Tensor | None] = [None] * len(batches)
    for output in outputs:
        found[output["number"]] = output["errors"]
    return found


def _forward_step(batches: Iterator[tuple[int, Batch]], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    number, batch = next(batches)
    batch = batch.to(torch.device(next(model.parameters()).device))
    assert isinstance(batch, PairBatch)

    def report(prediction: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        total, count, errors = pair_errors(batch, prediction)
        return total, count, {**errors, "number": number}

    return predict(batch, model), report


# (keys [n, 2], errors [n, 2]) of one step on one replica.
_Found = tuple[np.ndarray, np.ndarray]


def _step_errors(planned: Sequence[PlannedBatch], builder: PairBatchBuilder, chunks: list[VideoDiT]) -> _Found:
    keys = [np.stack([part.samples, part.epochs], axis=1).astype(np.int64) for part in planned]
    errors = forward_errors([builder.build(part) for part in planned], chunks)
    rows = [found.T.float().cpu().numpy() for found in errors if found is not None]
    return np.concatenate(keys), np.concatenate(rows) if rows else np.empty((0, 2), np.float32)


def _write_block(store: ReferenceErrors, start: int, end: int, found: list[_Found]) -> None:
    """Bring the errors of all replicas to rank 0, which stores them."""
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    first_of_replica = parallel_state.get_tensor_model_parallel_rank() == 0
    tells = last and first_of_replica and parallel_state.get_context_parallel_rank() == 0
    shares: list[list[_Found] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found if tells else None)
    if dist.get_rank() == 0:
        told = [part for share in shares if share is not None for part in share]
        keys, errors = (np.concatenate(parts) for parts in zip(*told, strict=True))
        if len(keys) != len(errors) or not np.isfinite(errors).all():
            raise UserError(f"{store.folder}: the reference's errors of steps {start} to {end} are not finite")
        store.add(start, end, keys, errors)
    dist.barrier()


def _replica() -> tuple[int, int]:
    return data_parallel_rank(), data_parallel_size()
