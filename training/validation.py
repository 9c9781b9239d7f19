"""Loss on held-out samples, with fixed noise at fixed times: the same figures in any layout on any number of ranks.

Every replica evaluates its share of the micro-batches through megatron-core's schedule; one reduction adds them up on
all ranks. Nobody waits at a barrier for a rank that validates alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import tee

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_video.flow_matching import TimeDensity, squared_errors
from megatron_video.noise import NoiseSource
from megatron_video.parallel import data_parallel_rank, data_parallel_size
from training.averaged_weights import finish_parameter_gathers
from training.data import Batch, BatchBuilder
from training.data_plan import PlannedBatch
from training.data_set import TrainingData
from training.optimizer import WrappedChunk
from training.train_step import LossFunction, predict, run_schedule
from training.validation_config import ValidationConfig

_STAGE = "validation"


@dataclass(frozen=True)
class ValidationLosses:
    """Mean squared error of the velocity on the held-out samples; every latent position counts alike."""

    loss: float
    """Over everything."""
    by_time: list[float]
    """At every time."""
    by_bucket: dict[str, list[float]]
    """The same apart for every bucket."""


@dataclass(frozen=True)
class ValidationBatch:
    """One micro-batch at one time."""

    bucket: int
    """Number of its bucket, which with `time` is the place where its loss is added."""
    time: int
    planned: PlannedBatch
    flops: float


class FixedTimes(NoiseSource):
    """Noise of validation: like training's, but t is given.

    Args:
        seed: of noise and posterior draws.
        probability: share of the density that lies below t.
        uniform: t is the probability itself, whatever the density.
    """

    def __init__(self, seed: int, probability: float, uniform: bool) -> None:
        super().__init__(seed, _STAGE)
        self._probability, self._uniform = probability, uniform

    def timestep(self, epoch: int, sample: int, density: TimeDensity) -> float:
        """The same for every sample of a bucket."""
        return float(np.float32(self._probability)) if self._uniform else density.quantile(self._probability)


class Validation:
    """The held-out samples of a run, and their loss.

    Args:
        config: what to validate on.
        data: the held-out samples.
        builder: the run's own; noise, times and data are replaced, text is never dropped.
    """

    def __init__(self, config: ValidationConfig, data: TrainingData, builder: BatchBuilder) -> None:
        self.config, self.data = config, data
        count = config.time_quantiles
        self.probabilities = [(index + 0.5) / count for index in range(count)]
        self._builders = [
            replace(
                builder,
                data=data,
                noise=FixedTimes(config.seed, probability, config.times == "uniform"),
                text_dropout=0.0,
            )
            for probability in self.probabilities
        ]
        self.buckets = sorted({bucket for _, bucket in data.groups()})
        self._batches = self._plan()

    def __len__(self) -> int:
        """Micro-batches of one validation over all replicas."""
        return len(self._batches)

    @property
    def sample_count(self) -> int:
        """Held-out samples in use."""
        return sum(len(batch.planned.samples) for batch in self._batches) // len(self.probabilities)

    @torch.no_grad()
    def run(self, model: list[WrappedChunk]) -> ValidationLosses:
        """Evaluate the weights that `model` has now; all ranks call it together."""
        return self._run(model, _error)

    @torch.no_grad()
    def drift(self, model: list[WrappedChunk], other: AbstractContextManager[None]) -> ValidationLosses:
        """Mean squared distance of the model's velocities from those it gives within `other`, which has other weights.

        Up to a weight by t it is the divergence (KL) of the two models' paths. Predictions wait in host memory.
        """
        kept: dict[int, Tensor] = {}

        def keep(number: int, target: Tensor, prediction: Tensor) -> Tensor:
            kept[number] = prediction.float().cpu()
            return _error(number, target, prediction)

        def distance(number: int, target: Tensor, prediction: Tensor) -> Tensor:
            return _error(number, kept[number].to(prediction.device), prediction)

        self._run(model, keep)
        with other:
            return self._run(model, distance)

    def _run(self, model: list[WrappedChunk], error: ErrorFunction) -> ValidationLosses:
        # A replica without a share would else miss the gathers that the others' forward passes make.
        finish_parameter_gathers(model)
        for chunk in model:
            chunk.eval()
        try:
            sums = self._evaluate(model, error)
        finally:
            for chunk in model:
                chunk.train()
        # The loss is on the last stage; tensor- and context-parallel ranks have it too, and it counts once.
        if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank():
            sums.zero_()
        torch.distributed.all_reduce(sums)
        return self._losses(sums)

    def _evaluate(self, model: list[WrappedChunk], error: ErrorFunction) -> Tensor:
        """[2, buckets, times] fp64: sums and counts of this replica's share; zeros but on the last stage."""
        sums = torch.zeros(2, len(self.buckets), len(self.probabilities), dtype=torch.float64, device=_device(model))
        share = self._share(model)
        if not share:
            return sums
        shapes = [self.data.shapes[self.buckets[item.bucket]] for item, _ in share]
        outputs = run_schedule(
            functools.partial(_forward_step, error),
            model,
            # Built when the first chunk needs them, and kept until the last one has them.
            tee(self._built(share), len(model)),
            len(share),
            max(shape.tokens for shape in shapes),
            self.config.micro_batch_size,
            forward_only=True,
        )
        for output in outputs:
            sums[:, output["bucket"], output["time"]] += output["sum_and_count"]
        return sums

    def _built(self, share: list[tuple[ValidationBatch, bool]]) -> Iterator[_Item]:
        for number, (item, counts) in enumerate(share):
            yield _Item(number, item, counts, self._builders[item.time].build(item.planned))

    def _plan(self) -> list[ValidationBatch]:
        """All micro-batches at all times, the dearest first."""
        batches = []
        for number, bucket in enumerate(self.buckets):
            samples = self._samples(bucket)
            for first in range(0, len(samples), self.config.micro_batch_size):
                part = samples[first : first + self.config.micro_batch_size]
                planned = PlannedBatch(bucket, part, np.zeros_like(part))
                flops = self.data.flops(self._builders[0].model, bucket, part)
                batches += [ValidationBatch(number, time, planned, flops) for time in range(len(self.probabilities))]
        return sorted(batches, key=lambda batch: -batch.flops)

    def _samples(self, bucket: str) -> np.ndarray:
        groups = [group for (_, name), group in self.data.groups().items() if name == bucket]
        samples = np.concatenate([group[np.arange(self._used(len(group)))] for group in groups])
        return samples[: self.config.samples_per_bucket]

    def _used(self, samples: int) -> int:
        limit = self.config.samples_per_bucket
        return samples if limit is None else min(samples, limit)

    def _share(self, model: list[WrappedChunk]) -> list[tuple[ValidationBatch, bool]]:
        """This replica's micro-batches, and whether they count: fill-ins are only there for the others' sake."""
        shares = deal_by_flops(self._batches, data_parallel_size())
        ours = [(batch, True) for batch in shares[data_parallel_rank()]]
        count = _needed_count(model, len(ours), max(len(share) for share in shares))
        # The cheapest of all.
        return ours + [(self._batches[-1], False)] * (count - len(ours))

    def _losses(self, sums: Tensor) -> ValidationLosses:
        totals, counts = sums.cpu().numpy()
        rows = zip(self.buckets, totals / counts, strict=True)
        return ValidationLosses(
            float(totals.sum() / counts.sum()),
            (totals.sum(0) / counts.sum(0)).tolist(),
            {bucket: row.tolist() for bucket, row in rows},
        )


def deal_by_flops(batches: Sequence[ValidationBatch], replicas: int) -> list[list[ValidationBatch]]:
    """Each micro-batch, the dearest first, to the replica that has the least to do."""
    shares: list[list[ValidationBatch]] = [[] for _ in range(replicas)]
    loads = [0.0] * replicas
    for batch in batches:
        idlest = loads.index(min(loads))
        shares[idlest].append(batch)
        loads[idlest] += batch.flops
    return shares


def _needed_count(model: list[WrappedChunk], ours: int, most: int) -> int:
    """Micro-batches a replica has to run: as many as the others where all gather weights together."""
    count = most if model[0].ddp_config.use_megatron_fsdp else ours
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    # The interleaved schedule takes whole groups.
    return -(-count // stages) * stages if len(model) > 1 else count


@dataclass(frozen=True)
class _Item:
    number: int
    """Among this replica's."""
    place: ValidationBatch
    counts: bool
    batch: Batch


# (number of the micro-batch, target, prediction) -> sum of squared errors of all its elements.
ErrorFunction = Callable[[int, Tensor, Tensor], Tensor]


def _error(number: int, target: Tensor, prediction: Tensor) -> Tensor:
    return squared_errors(prediction, target).double().sum()


def _forward_step(error: ErrorFunction, items: Iterator[_Item], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    item = next(items)
    batch = item.batch.to(next(model.parameters()).device)
    return predict(batch, model), functools.partial(_loss, error, item, batch.target)


def _loss(
    error: ErrorFunction, item: _Item, target: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor, dict[str, object]]:
    errors = error(item.number, target, prediction) / target.shape[2]
    positions = target[:, :, 0].numel()
    pair = torch.stack([errors, torch.full_like(errors, positions)])
    count = torch.full((), positions, dtype=torch.int32, device=errors.device)
    place = {"bucket": item.place.bucket, "time": item.place.time}
    return errors, count, {**place, "sum_and_count": pair if item.counts else torch.zeros_like(pair)}


def _device(model: list[WrappedChunk]) -> torch.device:
    return torch.device(next(model[0].parameters()).device)
