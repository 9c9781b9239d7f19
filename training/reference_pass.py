"""The reference's velocity errors: a pass over all draws of a run before its first step, or one in every step.

Neither keeps a second model on the device. The pass uses the run's own model before it takes its first weights; in a
step, the reference's weights change places with the trained ones, which wait in host memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from megatron_video.dit import DiTConfig, VideoDiT
from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files
from training import checkpoint
from training.averaged_weights import finish_parameter_gathers
from training.balance import PlannedBatch
from training.config import PretrainConfig
from training.data import Batch, StepBatches, StepData, iterate_steps
from training.optimizer import WrappedChunk
from training.preference_data import PairBatch, pair_errors
from training.reference_errors import FOLDER, ErrorFiles, ReferenceErrors, Table
from training.sample_ranks import decided_by_rank_0
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

    def check(self, model: DiTConfig) -> None:
        """Look before anything is built.

        Raises:
            UserError: a model of other sizes, or no averages where they are asked for.
        """
        checkpoint.check_same_model(self.checkpoint, model)
        checkpoint.check_averages(self.checkpoint, self.averaged)

    def load_into(self, chunks: Sequence[Any]) -> None:
        """Give the model the reference's weights; all ranks call it together.

        Raises:
            UserError: a model of other sizes, or no averages where they are asked for.
        """
        checkpoint.load_model_weights(self.checkpoint, list(chunks), averaged=self.averaged)


class RunReference(Protocol):
    """The reference of a run on pairs, as its steps use it. All ranks call each method together."""

    def make_ready(self, model: list[WrappedChunk], steps: Sequence[int]) -> None:
        """Have what these data steps need, before the first of them."""

    def with_errors(self, model: list[WrappedChunk], batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step with the reference's errors."""

    def in_place(self, model: list[WrappedChunk]) -> AbstractContextManager[None]:
        """Within it the model computes with the reference's weights."""


class PrecomputedReference:
    """Errors of all draws, computed in a pass before the first step; later, only those of data that moved up.

    Args:
        config: of the run.
        reference: its weights.
        identity: all that the errors depend on.
        batches: of the run, without the errors.
        working: called at every sign of progress.

    Raises:
        UserError: the run's folder holds errors of something else, or damaged ones; on all ranks.
    """

    def __init__(
        self,
        config: PretrainConfig,
        reference: Reference,
        identity: dict[str, Any],
        batches: StepBatches,
        working: Callable[[], None],
    ) -> None:
        folder = Path(config.run.output_dir) / FOLDER
        self.errors = ReferenceErrors(folder)
        self._config, self._reference, self._batches, self._working = config, reference, batches, working
        # Opened where it is used, on rank 0: a refusal is then one of all ranks.
        self._files = functools.partial(ErrorFiles, folder, identity)
        self._take_what_is_stored()

    def compute_missing(self, steps: Sequence[int], chunks: Sequence[Any]) -> None:
        """Compute the errors of data steps that have none; the model then may hold the reference's weights.

        A pass that is killed goes on with the block of steps it was in.
        """
        missing = self._missing(steps)
        if missing:
            self._reference.load_into(chunks)
            self._compute(missing, chunks)

    def make_ready(self, model: list[WrappedChunk], steps: Sequence[int]) -> None:
        """Where data was left out, later data moved up, of which the pass knew nothing.

        Raises:
            UserError: Megatron-FSDP keeps its weights in a form of its own.
        """
        missing = self._missing(steps)
        if not missing:
            return
        if self._config.parallel.use_megatron_fsdp:
            raise UserError(
                f"data steps {missing[0]} to {missing[-1]} have no reference errors, and parallel.use_megatron_fsdp="
                "true cannot take the reference's weights in between; leave faults.skip_data_steps and "
                "faults.spike_mads at their defaults, or take parallel.use_distributed_optimizer"
            )
        with self.in_place(model):
            self._compute(missing, model)

    def with_errors(self, model: list[WrappedChunk], batches: list[Batch]) -> list[Batch]:
        """They have them: the loader looks them up."""
        return batches

    @contextmanager
    def in_place(self, model: list[WrappedChunk]) -> Iterator[None]:
        """The weights are read from the checkpoint, and the trained ones wait in host memory: for what is rare."""
        finish_parameter_gathers(model)
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        trained = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        self._reference.load_into(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, held in zip(parameters, trained, strict=True):
                    parameter.copy_(held)

    def _missing(self, steps: Sequence[int]) -> list[int]:
        """By draw and not by file: another batch size has other draws in the same steps."""
        plan, has = self._batches.plan, self.errors.has

        def complete(batch: PlannedBatch) -> bool:
            return all(map(has, batch.samples.tolist(), batch.epochs.tolist()))

        return decided_by_rank_0(lambda: [step for step in steps if not all(map(complete, plan.step(step)))])

    def _compute(self, steps: list[int], chunks: Sequence[Any]) -> None:
        leads, data = dist.get_rank() == 0, self._config.data
        if leads:
            print(
                f"reference errors: {len(steps)} steps from step {steps[0]} on are computed once; kept in "
                f"{self.errors.folder}",
                flush=True,
            )
        wanted = iterate_steps(Subset(self._batches, steps), 0, len(steps), data.workers, data.prefetch_steps)
        progress = tqdm(zip(steps, wanted, strict=True), "reference", len(steps), unit="step", disable=not leads)
        found: list[Table] = []
        for step, step_data in progress:
            found.append(self._step_errors(step_data, chunks))
            self._working()
            if len(found) == _STEPS_PER_BLOCK or step == steps[-1]:
                self._store(step, found)
                found = []
        self._take_what_is_stored()

    def _step_errors(self, step: StepData, chunks: Sequence[Any]) -> Table:
        """Of this replica's part of a step."""
        keys = [np.stack([part.samples, part.epochs], axis=1).astype(np.int64) for part in step.planned]
        errors = forward_errors(step.batches, chunks)
        rows = [found.T.float().cpu().numpy() for found in errors if found is not None]
        return np.concatenate(keys), np.concatenate(rows) if rows else np.empty((0, 2), np.float32)

    def _store(self, last: int, found: list[Table]) -> None:
        """Bring the errors of all replicas to rank 0, which writes them; `last`: the step they end with."""
        shares: list[list[Table] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, found if _tells_for_its_replica() else None)
        decided_by_rank_0(lambda: self._write(last, [part for share in shares for part in share or []]))

    def _write(self, last: int, parts: list[Table]) -> None:
        keys, errors = (np.concatenate(values) for values in zip(*parts, strict=True))
        broken = keys[~np.isfinite(errors).all(1)]
        if len(broken):
            pairs = ", ".join(self._batches.builder.data.where(int(sample)) for sample in np.unique(broken[:4, 0]))
            raise UserError(
                f"the reference's error is not finite on {len(broken)} of {len(keys)} draws up to step {last + 1}: "
                f"{pairs}{', ...' if len(broken) > 4 else ''}. Either their latents are not finite (make these pairs "
                f"anew), or the weights of {self._reference.checkpoint} are not"
            )
        self._files().add(last, (keys, errors))

    def _take_what_is_stored(self) -> None:
        self.errors.take(decided_by_rank_0(lambda: self._files().read()))


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

    def make_ready(self, model: list[WrappedChunk], steps: Sequence[int]) -> None:
        """It is, for all data."""

    def with_errors(self, model: list[WrappedChunk], batches: list[Batch]) -> list[Batch]:
        """Computed here and now; the weights are the trained ones again after it."""
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


def _tells_for_its_replica() -> bool:
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return last and first and parallel_state.get_context_parallel_rank() == 0
