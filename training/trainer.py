"""The parts of a pretraining run, and what the loop asks of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_video.device import DeviceInfo
from training.checkpoint import TrainState
from training.checkpoint_saver import CheckpointSaver, SaveReport
from training.checkups import Checkups
from training.config import PretrainConfig
from training.corrupt_samples import ReplicaAgreement, check_corrupt
from training.data import Batch, StepBatches, StepData, iterate_steps
from training.data_plan import DataPlan
from training.data_set import TrainingData
from training.diverged import DivergedError
from training.ema import EMA
from training.events import EventLog
from training.layer_norms import LayerProbe
from training.optimizer import learning_rate, set_learning_rate
from training.phases import Phases
from training.preference import with_objective
from training.rank_table import RankTable
from training.reference_pass import RunReference
from training.refused_steps import name_batches
from training.rollback import tell_spike
from training.skipped_data import RemainingSteps, data_step
from training.spikes import note_step
from training.stop_signal import StopSignal
from training.stragglers import StragglerWatch
from training.telemetry import Telemetry
from training.train_step import StepResult


@dataclass
class Trainer:
    """The parts of a run that the loop moves."""

    config: PretrainConfig
    data: TrainingData
    plan: DataPlan
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    state: TrainState
    telemetry: Telemetry
    batches: StepBatches
    ema: EMA | None
    device: DeviceInfo
    events: EventLog
    """Also on other ranks than 0: what happened to one rank is written there."""
    phases: Phases
    stop: StopSignal
    checkups: Checkups
    ranks: RankTable
    reference: RunReference | None = None
    """Of runs on preference pairs."""
    saver: CheckpointSaver = field(init=False)
    stragglers: StragglerWatch = field(init=False)

    def __post_init__(self) -> None:
        """Saves belong to the run as a whole; all ranks make theirs together."""
        settings, keep = self.config.checkpoint, self.config.training.keep_checkpoints
        self.stragglers = StragglerWatch(self.config.faults, self.phases, self.ranks, self.device.device)
        self.saver = CheckpointSaver(Path(self.config.run.output_dir), settings, keep, self._tell_saved)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.state.step >= self.config.training.steps

    def steps_from_here(self) -> Iterator[StepData]:
        """The data of all steps to come; its position is the step number, nothing of the loader is stored."""
        if self.reference is not None:
            to_come = range(self.state.step, self.config.training.steps)
            self.reference.make_ready(self.model, [data_step(step, self.state.skipped_data) for step in to_come])
        steps = iterate_steps(
            RemainingSteps(self.batches, self.state.skipped_data),
            self.state.step,
            self.config.training.steps,
            self.config.data.workers,
            self.config.data.prefetch_steps,
            pin_memory=self.device.device.type == "cuda",
        )
        if not self.batches.leave_out_corrupt:
            return steps
        return map(ReplicaAgreement(self.batches.builder, self.config.parallel), steps)

    def tell_corrupt(self, step: StepData) -> int:
        """Name the samples left out of this replica's batches, on the rank whose turn it is; their number."""
        for found in step.corrupt:
            print(f"left out of step {self.state.step + 1}: {found.reason}", file=sys.stderr, flush=True)
            key = self.data.where(found.sample)
            self.events.record("corrupt_sample", self.state.step, key=key, reason=found.reason)
        return len(step.corrupt)

    def with_reference(self, batches: list[Batch]) -> list[Batch]:
        """Micro-batches with all that their loss needs."""
        if self.reference is None:
            return batches
        self.phases.enter("forward_backward")
        batches = with_objective(self.config, self.state.step, batches)
        return self.reference.with_errors(self.model, batches)

    def layer_probe(self) -> LayerProbe | None:
        """What measures the layers in the step to come, if that is one of those that do."""
        if not self.config.telemetry.measures_layers(self.state.step + 1):
            return None
        return LayerProbe(self.model, self.optimizer)

    def next_learning_rate(self) -> float:
        """Set the learning rate of the step to come: a pure function of the step, so a resume needs no scheduler."""
        settings = self.config.optimizer
        rate = learning_rate(self.state.step, settings, self.config.training.steps)
        set_learning_rate(self.optimizer, rate, settings.weight_decay)
        return rate

    def save_is_due(self, result: StepResult) -> bool:
        """Whether the step just done ends with a checkpoint."""
        # Not stop.requested: all ranks leave at the same step.
        asked = result.stop_reason is not None
        return asked or self.state.step % self.config.training.save_every == 0 or self.finished

    def save(self) -> None:
        """Begin a checkpoint of this moment; it is written while training goes on.

        Raises:
            CheckpointError: on all ranks; the one before failed, and checkpoint.on_error is to stop.
        """
        self.phases.enter("checkpoint", self.state.step)
        if self.saver.busy:
            self.telemetry.say(f"the checkpoint of step {self.state.step} waits for the one before it")
        # For the reader of train_state.json; a resume needs the step alone.
        self.state.consumed_samples = self.plan.consumed(data_step(self.state.step, self.state.skipped_data))
        self.saver.save(self.model, self.optimizer, self.state, self.config, self.ema)
        self.stop.between_steps()

    def finish_saves(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            CheckpointError: on all ranks; there is none.
        """
        self.phases.enter("checkpoint", self.state.step)
        self.saver.finish()

    def count(self, step: StepData, result: StepResult) -> None:
        """Note that a step is done, and let the averages follow the weights.

        Raises:
            DivergedError: too many steps in a row were refused.
            UserError: too many samples could not be read.
        """
        self.state.step += 1
        self.state.refused_steps += result.refused
        self.state.refused_in_a_row = self.state.refused_in_a_row + 1 if result.refused else 0
        if self.ema is not None and not result.refused:
            self.ema.update()
        if result.refused:
            self._tell_refused(step, result)
        self.state.corrupt_samples += result.corrupt_samples
        check_corrupt(self.state.corrupt_samples, self.config.data.max_corrupt_samples)
        spike = note_step(self.state, result, self.config.faults)
        if spike is not None:
            tell_spike(self, spike)
        limit = self.config.training.max_refused_steps
        if self.state.refused_in_a_row >= limit:
            raise DivergedError(
                f"{limit} steps in a row had a non-finite loss or gradient; the last good checkpoint is in "
                f"{self.config.run.output_dir}/checkpoints. Lower optimizer.learning_rate, or look at the data"
            )

    def tell_stragglers(self) -> None:
        """Name ranks that are slower than their peers, every straggler_every steps."""
        for found in self.stragglers.after_step(self.state.step):
            self.telemetry.say(str(found))
            place = found.place
            self.events.record(
                "straggler",
                self.state.step,
                slow_rank=place.rank,
                host=place.host,
                coordinates=place.coordinates,
                ranks=found.ranks,
                phase=found.phase,
                seconds=found.seconds,
                others_seconds=found.others_seconds,
                ratio=found.ratio,
                z_score=found.z_score,
            )

    def close(self, state: str, reason: str) -> None:
        """Leave the verdict of this life in status.json and events.jsonl; a save under way is let finish."""
        self.phases.enter("checkpoint")
        self.saver.drain()
        self.telemetry.close(state, self.state.step)
        if self.telemetry.active:
            self.events.record("stop", self.state.step, state=state, reason=reason)

    def _tell_saved(self, report: SaveReport) -> None:
        """On rank 0, from the thread of the save."""
        self.telemetry.say(str(report))
        if report.error is not None:
            self.events.record("save_failed", report.step, checkpoint=report.folder, reason=report.error)
            self.stop.save_failed = self.config.checkpoint.on_error == "stop"
            return
        self.stop.saw_save(report.seconds)
        self.events.record("save", report.step, **report.details())

    def _tell_refused(self, step: StepData, result: StepResult) -> None:
        batches = name_batches(step, result, self.data)
        if self.telemetry.active:
            in_a_row = self.state.refused_in_a_row
            details = {"loss": result.loss, "grad_norm": result.grad_norm, "in_a_row": in_a_row, "batches": batches}
            self.events.record("refused_step", self.state.step, **details)
        limit = self.config.training.max_refused_steps
        self.telemetry.say(
            f"step {self.state.step} REFUSED: loss {result.loss}, gradient norm {result.grad_norm}; weights are "
            f"unchanged ({self.state.refused_in_a_row} in a row, {limit} stop the run); samples: "
            + "; ".join(f"{batch['bucket']}: {', '.join(batch['samples'])}" for batch in batches[:4])
        )
