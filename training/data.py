"""Batches of the training run: samples of the plan, noised, collated, and built ahead of the step that needs them.

Every rank of a replica builds the same batch from the same pure functions; nothing is sent between ranks.
Shapes: b samples, T latent frames, C channels, h x w latent pixels, L text tokens, d text width.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_video.dit.config import DiTConfig
from megatron_video.flow_matching import TimeDensity, interpolate, velocity
from megatron_video.noise import NoiseSource
from megatron_video.shard_schema import DamagedSampleError, ShardSample, Text
from megatron_video.vae import sample_posterior
from training.balance import PlannedBatch, samples_by_bucket
from training.data_plan import DataPlan
from training.data_set import TrainingData


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the model."""

    latents: Tensor
    """x_t, [b, T, C, h, w] fp32."""
    timestep: Tensor
    """t, [b] fp32 in [0, 1)."""
    llm_states: Tensor
    """[b, L, d_llm], rows padded with zeros to the longest."""
    clip_states: Tensor | None
    """[b, slots, d_clip], or None for a model without CLIP."""
    text_lengths: Tensor
    """[b] int64: CLIP slots + true Step-LLM tokens."""
    target: Tensor
    """Velocity x0 - noise, [b, T, C, h, w] fp32."""
    fps: Tensor | None = None
    """[b] fp32 frames per second, for models with additional conditions."""
    dropout_seeds: Tensor | None = None
    """[b] int64, for models with dropout."""
    counted: bool = True
    """Whether it counts in loss and gradient; see BatchBuilder.stand_in."""

    measures: ClassVar[tuple[str, ...]] = ()
    """Names of what its loss reports beside sums and counts."""

    def select(self, rows: list[int]) -> Batch:
        """The same batch with these rows alone, padded as if they had been batched alone."""
        slots = 0 if self.clip_states is None else self.clip_states.shape[1]
        chosen = self._map(lambda tensor: tensor[rows])
        return replace(chosen, llm_states=chosen.llm_states[:, : int(chosen.text_lengths.max()) - slots])

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with computation."""
        return self._map(lambda tensor: tensor.pin_memory())

    # Optional tensors stay None.
    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed: dict[str, Any] = {name: function(old) for name, old in values.items() if isinstance(old, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class BatchBuilder:
    """Turns planned samples into a batch; a pure function of the plan."""

    data: TrainingData
    noise: NoiseSource
    density: TimeDensity
    text_dropout: float
    text_dtype: torch.dtype
    model: DiTConfig

    rows_per_sample: ClassVar[int] = 1
    """Rows of a batch that a sample becomes."""

    def build(self, planned: PlannedBatch) -> Batch:
        """Read, noise and collate the samples of one micro-batch.

        Raises:
            UserError: a sample is damaged, or its latent does not fit its bucket.
        """
        drawn = zip(planned.samples, planned.epochs, strict=True)
        return self.collate([self._row(int(sample), int(epoch)) for sample, epoch in drawn])

    def build_readable(self, planned: PlannedBatch) -> tuple[Batch | None, dict[int, str]]:
        """The batch of the samples that can be read (None: there is none), and why not by row of those that cannot."""
        rows, damaged = [], {}
        for number, (sample, epoch) in enumerate(zip(planned.samples, planned.epochs, strict=True)):
            try:
                rows.append(self._row(int(sample), int(epoch)))
            except DamagedSampleError as error:
                damaged[number] = str(error)
        return self.collate(rows) if rows else None, damaged

    def stand_in(self, planned: PlannedBatch) -> Batch:
        """One sample of the batch's shape that counts for nothing, where none of its own can be read.

        The schedule goes on with as many micro-batches as planned, on all ranks.
        """
        sample, epoch = int(planned.samples[0]), int(planned.epochs[0])
        shape = self.data.shapes[planned.bucket]
        channels = self.data.datasets[0].rows.info.latent_channels
        noise = self.noise.noise(epoch, sample, (shape.frames, channels, shape.height, shape.width))
        llm, clip = self.data.null_text
        # On the path from noise to the same noise: finite everywhere, with a target of zero.
        row = Row(0.0, 0.5, noise, noise, llm, clip, self.noise.dropout_seed(epoch, sample))
        return replace(self.collate([row]), counted=False)

    def collate(self, rows: list[Row]) -> Batch:
        # Row r of every tensor below belongs to rows[r].
        time = torch.tensor([row.time for row in rows], dtype=torch.float32)
        data, noise = torch.stack([row.data for row in rows]), torch.stack([row.noise for row in rows])
        # Stored without padding; a batch is padded only as far as its own longest caption, which costs the least.
        llm_states = torch.nn.utils.rnn.pad_sequence([row.llm for row in rows], batch_first=True)
        with_clip, with_fps = self.model.clip_channels is not None, self.model.use_additional_conditions
        clip_states = torch.stack([row.clip for row in rows]).to(self.text_dtype) if with_clip else None
        # CLIP slots come first and count in full, their padding included, as in the released pipeline.
        slots = clip_states.shape[1] if clip_states is not None else 0
        return Batch(
            # Everything about time and target is fp32 here; only the model casts down.
            latents=interpolate(noise, data, time),
            timestep=time,
            llm_states=llm_states.to(self.text_dtype),
            clip_states=clip_states,
            text_lengths=torch.tensor([slots + len(row.llm) for row in rows]),
            target=velocity(noise, data),
            fps=torch.tensor([row.fps for row in rows]) if with_fps else None,
            dropout_seeds=torch.tensor([row.dropout_seed for row in rows]) if self.model.hidden_dropout else None,
        )

    def _row(self, sample: int, epoch: int) -> Row:
        stored = self.data[sample]
        # Of this sample alone, whatever it is batched with.
        tokens = stored.moments[:, 0].numel() // self.model.patch_size**2
        latent = self._latent(stored, sample, epoch)
        llm, clip = self._text(stored, sample, epoch)
        return Row(
            fps=float(stored.metadata["fps"]) if self.model.use_additional_conditions else 0.0,
            time=self.noise.timestep(epoch, sample, self.density.for_tokens(tokens)),
            data=latent,
            noise=self.noise.noise(epoch, sample, latent.shape),
            llm=llm,
            clip=clip,
            dropout_seed=self.noise.dropout_seed(epoch, sample),
            loser=None if stored.loser is None else stored.loser.float(),
        )

    def _latent(self, stored: ShardSample, sample: int, epoch: int) -> Tensor:
        if stored.loser is not None:
            return stored.moments.float()
        # The VAE stores the posterior, not a draw from it: every epoch sees another draw.
        moments = stored.moments.float()
        shape = (moments.shape[0], moments.shape[1] // 2, *moments.shape[2:])
        return sample_posterior(moments, self.noise.posterior(epoch, sample, shape))

    def _text(self, stored: ShardSample, sample: int, epoch: int) -> Text:
        # The encoded empty caption, not zeros: sampling guides against the same states.
        if self.noise.drop_text(epoch, sample, self.text_dropout):
            return self.data.null_text
        weights = self.data.caption_weights
        shares = {kind: weights[kind] for kind in stored.captions if weights.get(kind)}
        if not shares:
            return stored.llm, stored.clip
        return stored.captions[self.noise.caption(epoch, sample, shares)]


@dataclass(frozen=True)
class Row:
    fps: float
    time: float
    data: Tensor
    noise: Tensor
    llm: Tensor
    clip: Tensor
    dropout_seed: int
    loser: Tensor | None = None


@dataclass(frozen=True)
class CorruptSample:
    """A sample that could not be read."""

    batch: int
    """Micro-batch of the replica's part of the step, ..."""
    row: int
    """... and place in it as planned."""
    sample: int
    reason: str


@dataclass(frozen=True)
class StepData:
    """This replica's part of one step, and the size of the whole global batch."""

    batches: list[Batch]
    samples: int
    tokens: int
    flops: float
    planned: list[PlannedBatch]
    """What the batches were built from."""
    corrupt: list[CorruptSample] = field(default_factory=list)
    """Samples that this rank could not read; after the replica's agreement, those that this rank tells of."""

    def pin_memory(self) -> StepData:
        """The same with batches in page-locked memory."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class StepBatches(Dataset[StepData]):
    """Item k: the data of step k for one replica."""

    def __init__(
        self, builder: BatchBuilder, plan: DataPlan, rank: int, size: int, leave_out_corrupt: bool = False
    ) -> None:
        self.builder, self.plan, self.rank, self.size = builder, plan, rank, size
        self.leave_out_corrupt = leave_out_corrupt
        self._tokens = builder.data.tokens(builder.model)

    def __getitem__(self, step: int) -> StepData:
        # All replicas plan the whole step; the sizes of the global batch then need no communication.
        planned, data, model = self.plan.step(step), self.builder.data, self.builder.model
        rows = self.builder.rows_per_sample
        own = self.plan.deal(planned, self.rank, self.size)
        batches, corrupt = self._build(own)
        return StepData(
            batches=batches,
            planned=own,
            corrupt=corrupt,
            samples=sum(len(batch.samples) for batch in planned),
            tokens=rows * sum(len(batch.samples) * self._tokens[batch.bucket] for batch in planned),
            flops=rows * sum(data.flops(model, name, samples) for name, samples in samples_by_bucket(planned).items()),
        )

    def _build(self, own: list[PlannedBatch]) -> tuple[list[Batch], list[CorruptSample]]:
        if not self.leave_out_corrupt:
            return [self.builder.build(planned) for planned in own], []
        batches, corrupt = [], []
        for number, planned in enumerate(own):
            batch, reasons = self.builder.build_readable(planned)
            batches.append(batch or self.builder.stand_in(planned))
            corrupt += [CorruptSample(number, row, int(planned.samples[row]), why) for row, why in reasons.items()]
        return batches, corrupt


def iterate_steps(
    steps: Dataset[StepData], first: int, last: int, workers: int, prefetch: int, pin_memory: bool = False
) -> Iterator[StepData]:
    """Data of the steps `first` to `last` - 1 in order, built ahead by a thread or by worker processes.

    How they are built changes when they are ready, never what is in them.
    """
    # A small model's batches take milliseconds: starting processes for them costs more than a thread.
    if workers == 0:
        return _ThreadedSteps(steps, first, last, prefetch, pin_memory)
    return iter(
        DataLoader(
            steps,
            # An item is a whole step already.
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            # Per worker, rounded up.
            prefetch_factor=-(-prefetch // workers),
            collate_fn=_as_is,  # batches are made by the builder
            pin_memory=pin_memory,
        )
    )


def _as_is(item: Any) -> Any:
    return item


# A step, the end, or what went wrong.
_Ready: TypeAlias = StepData | BaseException | None


class _ThreadedSteps:
    """Iterator whose items are built by one background thread."""

    def __init__(self, steps: Dataset[StepData], first: int, last: int, prefetch: int, pin_memory: bool) -> None:
        # Bounded: a fast builder waits here instead of filling the memory.
        self._ready: queue.Queue[_Ready] = queue.Queue(maxsize=prefetch)
        unwanted = threading.Event()
        # The thread must not hold the iterator: a run that goes back drops it for another.
        weakref.finalize(self, unwanted.set)
        # Daemon: a run that ends early does not wait for batches that nobody wants.
        work = (steps, range(first, last), pin_memory, self._ready, unwanted)
        threading.Thread(target=_build_steps, args=work, name="batches", daemon=True).start()

    def __iter__(self) -> _ThreadedSteps:
        return self

    def __next__(self) -> StepData:
        # Blocks while the builder is behind; the loop measures this as data wait.
        item = self._ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item


def _build_steps(
    steps: Dataset[StepData], numbers: range, pin_memory: bool, ready: queue.Queue[_Ready], unwanted: threading.Event
) -> None:
    try:
        for number in numbers:
            data = steps[number]
            if not _put(ready, data.pin_memory() if pin_memory else data, unwanted):
                return
        _put(ready, None, unwanted)
    except BaseException as error:  # handed to the training thread, which raises it
        _put(ready, error, unwanted)


def _put(ready: queue.Queue[_Ready], item: _Ready, unwanted: threading.Event) -> bool:
    """Wait for room; False when nobody will take it any more."""
    while not unwanted.is_set():
        try:
            ready.put(item, timeout=1)
            return True
        except queue.Full:
            continue
    return False
