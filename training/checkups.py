"""What a run does between steps now and then: loss on held-out samples, and sample videos. All ranks take part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_video.device import DeviceInfo
from megatron_video.errors import UserError
from training.averaged_weights import averaged_weights
from training.config import PretrainConfig
from training.data import BatchBuilder
from training.data_set import TrainingData
from training.events import read_events
from training.held_out import check_held_out
from training.run_tail import RunTail
from training.sample_ranks import decided_by_rank_0
from training.sample_videos import SampleVideos
from training.telemetry import Stopwatch
from training.validation import Validation, ValidationLosses

if TYPE_CHECKING:
    from training.trainer import Trainer

# Names of weights in records and figures.
TRAINED, AVERAGED = "trained", "averaged"
HELD_OUT_RECORD = "held_out_checked.json"


class Checkups:
    """Validation and sample videos of a run.

    Args:
        config: the run's.
        data: the training data.
        builder: of the training batches.
        device: to compute on. Prompts are encoded here and now, so there must be room for the text encoders.

    Raises:
        UserError: held-out samples or encoders that do not fit the training data.
    """

    def __init__(self, config: PretrainConfig, data: TrainingData, builder: BatchBuilder, device: DeviceInfo) -> None:
        self.config = config
        self.validation = open_validation(config, data, builder) if config.validation.every else None
        self.samples = SampleVideos(config, data, device) if config.samples.every else None

    def describe(self) -> Iterator[str]:
        """Lines for the start of the run."""
        if self.validation is not None:
            settings = self.config.validation
            times = ", ".join(f"{probability:.2f}" for probability in self.validation.probabilities)
            yield (
                f"validation every {settings.every} steps: {self.validation.sample_count} samples of "
                f"{', '.join(self.validation.buckets)} at "
                f"{settings.time_quantiles} quantiles of t ({settings.times}: {times}) = {len(self.validation)} "
                "micro-batches over all replicas"
            )
        if self.samples is not None:
            yield (
                f"sample videos every {self.config.samples.every} steps: {len(self.samples.texts.prompts)} prompts, "
                f"{self.samples.size.name}, {self.config.samples.steps} Euler steps"
            )

    def are_due(self, step: int) -> bool:
        """Whether anything is to be done after `step`, counted from 1."""
        return bool(self._due(step))

    def run(self, trainer: Trainer, loss: float) -> None:
        """Do what is due after the step just done, whose loss tells its weights from those of another attempt at it."""
        self._do(trainer, self._due(trainer.state.step), loss)

    def make_up(self, trainer: Trainer) -> None:
        """Do what the life before was stopped in, or before, if this one begins right behind that step."""
        step, folder = trainer.state.step, Path(self.config.run.output_dir)
        due = self._due(step) if step else set()
        if due:
            missing, loss = decided_by_rank_0(lambda: _left_undone(folder, step, due))
            self._do(trainer, missing, loss)

    def _due(self, step: int) -> set[str]:
        last, validation, samples = self.config.training.steps, self.config.validation, self.config.samples
        due = {"validation": validation.is_due(step, last), "samples": samples.is_due(step, last)}
        return {kind for kind, is_due in due.items() if is_due}

    def _do(self, trainer: Trainer, kinds: set[str], loss: float) -> None:
        trainer.phases.enter("validation", trainer.state.step)
        if self.validation is not None and "validation" in kinds:
            self._validate(trainer, self.validation)
        if self.samples is not None and "samples" in kinds:
            self._sample(trainer, self.samples, loss)

    def _validate(self, trainer: Trainer, validation: Validation) -> None:
        watch = Stopwatch()
        losses = {TRAINED: validation.run(trainer.model)}
        if trainer.ema is not None and self.config.validation.ema:
            with self._weights(trainer, AVERAGED):
                losses[AVERAGED] = validation.run(trainer.model)
        drift = self._drift(trainer, validation)
        seconds = watch.lap()
        trainer.telemetry.log_validation(trainer.state.step, losses, seconds, drift)
        if trainer.telemetry.active:
            trainer.events.record(
                "validation",
                trainer.state.step,
                seconds=seconds,
                quantiles=validation.probabilities,
                losses={name: _record(loss) for name, loss in losses.items()},
                **({} if drift is None else {"drift": _record(drift)}),
            )

    def _drift(self, trainer: Trainer, validation: Validation) -> ValidationLosses | None:
        """How far a run on preference pairs is from its reference; None for other runs."""
        # Megatron-FSDP keeps its weights in a form of its own.
        if trainer.reference is None or self.config.parallel.use_megatron_fsdp:
            return None
        return validation.drift(trainer.model, trainer.reference.in_place(trainer.model))

    def _sample(self, trainer: Trainer, samples: SampleVideos, loss: float) -> None:
        watch, step = Stopwatch(), trainer.state.step
        weights = AVERAGED if trainer.ema is not None and self.config.samples.ema else TRAINED
        with self._weights(trainer, weights):
            folder = samples.run(trainer.model, step, f"{weights}, loss {loss!r}")
        seconds = watch.lap()
        trainer.telemetry.log_samples(step, folder, self.config.samples.fps, seconds)
        if trainer.telemetry.active:
            trainer.events.record("samples", step, seconds=seconds, folder=folder.path, weights=weights)

    @contextmanager
    def _weights(self, trainer: Trainer, name: str) -> Iterator[None]:
        if name == TRAINED:
            yield
            return
        assert trainer.ema is not None
        with averaged_weights(trainer.model, trainer.optimizer, trainer.ema):
            yield


def open_validation(config: PretrainConfig, data: TrainingData, builder: BatchBuilder) -> Validation:
    """Open the held-out samples and check them against the training data.

    Raises:
        UserError: on all ranks: they share source videos with it, were encoded otherwise, or do not fit the model.
    """
    held_out = open_held_out(config, data)
    refusal: list[str | None] = [None]
    # One rank reads the indices; the others must hear of a refusal, or they would wait for it.
    if torch.distributed.get_rank() == 0:
        record = Path(config.run.output_dir) / HELD_OUT_RECORD
        try:
            check_held_out(data.folders, held_out.folders, record)
        except UserError as error:
            refusal = [str(error)]
    torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise UserError(refusal[0])
    return Validation(config.validation, held_out, builder)


def open_held_out(config: PretrainConfig, data: TrainingData) -> TrainingData:
    """The held-out samples of a run.

    Raises:
        UserError: they are not there, were encoded otherwise than the training data, or do not fit the model.
    """
    held_out = TrainingData(config.validation.shards, config.data.buckets, read_attempts=config.data.read_attempts)
    held_out.weigh_captions(config.data.caption_weights)
    held_out.check_model(config.model)
    _check_same_encoding(held_out, data)
    return held_out


def _left_undone(folder: Path, step: int, due: set[str]) -> tuple[set[str], float]:
    """Which of the `due` have no record after `step`, and the loss of that step."""
    done = {event["event"] for event in read_events(folder, *due) if event["step"] == step}
    tail = RunTail(folder)
    tail.read()
    losses = [line["loss"] for line in tail.steps if line["step"] == step]
    return due - done, losses[-1] if losses else float("nan")


def _check_same_encoding(held_out: TrainingData, data: TrainingData) -> None:
    ours, theirs = held_out.datasets[0], data.datasets[0]
    for name in ("vae_fingerprint", "text_fingerprint"):
        if getattr(ours.dataset_info, name) != getattr(theirs.dataset_info, name):
            raise UserError(
                f"validation.shards: {ours.folder} was encoded with other models than {theirs.folder} ({name}: "
                f"{getattr(ours.dataset_info, name)} and {getattr(theirs.dataset_info, name)})"
            )


def _record(losses: ValidationLosses) -> dict[str, object]:
    return {"loss": losses.loss, "by_time": losses.by_time, "by_bucket": losses.by_bucket}
