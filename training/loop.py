"""The training loop: what happens in a run, in order."""

from __future__ import annotations

from pathlib import Path

from megatron_video.device import DeviceInfo
from training.build_trainer import build_trainer
from training.checkpoint import TrainState
from training.config import PretrainConfig
from training.data import StepData
from training.data_set import TrainingData
from training.diverged import DIVERGED_EXIT_CODE, DivergedError
from training.phases import Phases
from training.rank_table import gather_rank_table
from training.resiliency import watched_by_rank_monitor
from training.rollback import roll_back_if_needed
from training.stop_signal import REQUEUE_EXIT_CODE
from training.telemetry import StepMetrics, Stopwatch
from training.time_bins import mean_by_time
from training.train_step import StepResult, train_step
from training.trainer import Trainer
from training.watchdog import Watchdog


def train(config: PretrainConfig, data: TrainingData, device: DeviceInfo) -> int:
    """Train from the newest checkpoint of the run's folder, or from the start, to the last step.

    Returns:
        0 when the last step is done, REQUEUE_EXIT_CODE when the run was asked to stop and has saved,
        DIVERGED_EXIT_CODE when too many steps were refused or too many rollbacks needed.

    Raises:
        UserError: the checkpoint does not fit the configuration.
    """
    phases, ranks = Phases(device.device), gather_rank_table()
    watchdog = Watchdog(config.faults, phases, ranks, Path(config.run.output_dir))
    with watchdog, watched_by_rank_monitor(config.faults.resiliency_ext, phases):
        trainer = build_trainer(config, data, device, phases, ranks)
        try:
            with trainer.stop:
                reason = run_steps(trainer)
                trainer.finish_saves()
        except DivergedError as error:
            trainer.close("failed", str(error))
            trainer.telemetry.say(f"error: {error}")
            return DIVERGED_EXIT_CODE
        except BaseException as error:
            trainer.close("failed", repr(error))
            raise
        trainer.close("finished" if trainer.finished else "stopped", reason)
    return 0 if trainer.finished else REQUEUE_EXIT_CODE


def run_steps(trainer: Trainer) -> str:
    """Train to the last step, or until a stop is asked for; the last save has begun when this returns.

    Returns:
        Why it returned.
    """
    state, phases = trainer.state, trainer.phases
    if state.step == 0 and trainer.config.training.save_initial:
        trainer.save()
    trainer.checkups.make_up(trainer)
    steps = trainer.steps_from_here()
    watch = Stopwatch()
    while not trainer.finished:
        phases.enter("data", state.step)
        step = next(steps)
        # Time since the end of the last step: waiting for data.
        data_seconds = watch.lap()
        rate = trainer.next_learning_rate()
        result = train_step(
            trainer.model,
            trainer.optimizer,
            trainer.with_reference(step.batches),
            trainer.stop.flags(),
            phases,
            trainer.layer_probe(),
            trainer.tell_corrupt(step),
            trainer.config.pack_positions,
        )
        phases.enter("report")
        trainer.count(step, result)
        trainer.tell_stragglers()
        trainer.telemetry.log_step(step_metrics(state, step, result, rate, data_seconds, data_seconds + watch.lap()))
        rolled_back = roll_back_if_needed(trainer)
        if rolled_back:
            steps = trainer.steps_from_here()
            watch.lap()
        elif trainer.save_is_due(result):
            trainer.save()
            # Saving is not part of the next step's time.
            watch.lap()
        if result.stop_reason is not None:
            return result.stop_reason
        if not rolled_back and trainer.checkups.are_due(state.step):
            trainer.checkups.run(trainer, result.loss)
            watch.lap()
    return "last step done"


def step_metrics(
    state: TrainState, step: StepData, result: StepResult, rate: float, data_seconds: float, step_seconds: float
) -> StepMetrics:
    """What metrics.jsonl says of the step just counted."""
    return StepMetrics(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        samples=step.samples,
        tokens=step.tokens,
        flops=step.flops,
        refused=result.refused,
        loss_by_time=mean_by_time(result.loss_sums_by_time, result.positions_by_time),
        positions_by_time=result.positions_by_time,
        rollbacks=len(state.rollbacks),
        layer_norms=result.layer_norms,
        preference=result.measures or None,
    )
