"""Batches of preference pairs: winner and loser of one prompt at one timestep with one noise, and their loss."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.shard_schema import ShardSample
from training.balance import PlannedBatch
from training.data import Batch, BatchBuilder, Row
from training.preference_loss import MEASURES, Objective, mean_errors, preference_measures
from training.time_bins import sums_by_time


class References(Protocol):
    """Where the reference's errors are."""

    def errors(self, samples: list[int], epochs: list[int]) -> Tensor:
        """Mean squared velocity errors of draws of pairs, [2, b] fp32, winners first.

        Raises:
            UserError: a draw has none.
        """


@dataclass(frozen=True)
class PairBatch(Batch):
    """b pairs as 2b rows: the winners, then their losers in the same order, each at its winner's t with its noise."""

    measures: ClassVar[tuple[str, ...]] = MEASURES

    objective: Objective | None = None
    """Of this step; None: the pairs are only evaluated."""
    reference_errors: Tensor | None = None
    """[2, b] fp32; None: still to be computed."""


@dataclass(frozen=True)
class PairBatchBuilder(BatchBuilder):
    """Turns planned pairs into batches.

    Everything random is keyed by the pair, so winner and loser share timestep, noise, text dropout and dropout masks;
    so do policy and reference, whose batches are the same.
    """

    rows_per_sample: ClassVar[int] = 2

    references: References | None = None
    """None: batches come without the reference's errors."""

    def build(self, planned: PlannedBatch) -> Batch:
        """Read, noise and collate the pairs of one micro-batch.

        Raises:
            UserError: a pair is damaged, does not fit its bucket, or the reference's errors of it are missing.
        """
        batch = super().build(planned)
        assert isinstance(batch, PairBatch)
        if self.references is None:
            return batch
        errors = self.references.errors(planned.samples.tolist(), planned.epochs.tolist())
        return replace(batch, reference_errors=errors)

    def _latent(self, stored: ShardSample, sample: int, epoch: int) -> Tensor:
        for member, latent in (("winner", stored.moments), ("loser", stored.loser)):
            # Here and not by its effects: these are seen hours later, in a loss or in the reference's errors.
            if latent is not None and not latent.isfinite().all():
                raise UserError(
                    f"{self.data.where(sample)}: the latent of the {member} has values that are not finite; leave the "
                    "pair out, or generate its videos again"
                )
        return super()._latent(stored, sample, epoch)

    def collate(self, rows: list[Row]) -> PairBatch:
        losers = [replace(row, data=row.loser) for row in rows if row.loser is not None]
        assert len(losers) == len(rows), "TrainingData was opened for pairs"
        batch = super().collate([*rows, *losers])
        values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        return PairBatch(**values)


def pair_loss(batch: PairBatch, prediction: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Preference loss as megatron-core's triple (sum over pairs, number of pairs, report), on the last stage only.

    Args:
        batch: b pairs, with the reference's errors.
        prediction: [2b, T, C, h, w].
    """
    assert batch.objective is not None
    assert batch.reference_errors is not None
    errors = mean_errors(prediction, batch.target).view(2, -1)
    losses = batch.objective.losses(errors, batch.reference_errors)
    count = torch.full((), losses.numel(), dtype=torch.int32, device=losses.device)
    measures = preference_measures(batch.objective, errors, batch.reference_errors)
    values = torch.cat([losses.detach()[None], torch.ones_like(losses)[None], measures])
    return losses.sum(), count, {"sums_and_counts": sums_by_time(batch.timestep[: losses.numel()], values)}


def pair_errors(batch: PairBatch, prediction: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The errors alone, of the reference's forward pass: report `errors` [2, b]; arguments as those of `pair_loss`."""
    errors = mean_errors(prediction, batch.target).view(2, -1)
    count = torch.full((), errors.shape[1], dtype=torch.int32, device=errors.device)
    return errors.sum(), count, {"errors": errors.detach()}
