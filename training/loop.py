"""The training loop: what happens in a run, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_video.device import DeviceInfo
from megatron_video.dit import build_dit
from megatron_video.errors import UserError
from megatron_video.noise import NoiseSource
from megatron_video.parallel import data_parallel_rank, data_parallel_size
from training import checkpoint
from training.checkpoint import TrainState
from training.config import PretrainConfig
from training.data import BatchBuilder, StepBatches, iterate_steps
from training.data_plan import DataPlan
from training.data_set import TrainingData
from training.ema import EMA
from training.optimizer import build_optimizer, learning_rate, set_learning_rate, wrap_data_parallel
from training.startup import describe_changes, describe_run
from training.stop_signal import REQUEUE_EXIT_CODE, StopSignal
from training.telemetry import StepMetrics, Stopwatch, Telemetry
from training.time_bins import mean_by_time
from training.train_step import StepResult, train_step

# Names of training.precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        watch = Stopwatch()
        # For the reader of train_state.json; a resume needs the step alone.
        self.state.consumed_samples = self.plan.consumed(self.state.step)
        folder = checkpoint.save_checkpoint(
            Path(self.config.run.output_dir),
            self.model,
            self.optimizer,
            self.state,
            self.config,
            self.config.training.keep_checkpoints,
            self.ema,
        )
        self.telemetry.say(f"saved {folder} in {watch.lap():.1f} s")

    def count(self, result: StepResult) -> None:
        """Note that a step is done, and let the averages follow the weights.

        Raises:
            RuntimeError: too many steps in a row were refused.
        """
        self.state.step += 1
        self.state.refused_steps += result.refused
        self.state.refused_in_a_row = self.state.refused_in_a_row + 1 if result.refused else 0
        if self.ema is not None and not result.refused:
            self.ema.update()
        limit = self.config.training.max_refused_steps
        if result.refused:
            self.telemetry.say(
                f"step {self.state.step} REFUSED: loss {result.loss}, gradient norm {result.grad_norm}; weights are "
                f"unchanged ({self.state.refused_in_a_row} in a row, {limit} stop the run)"
            )
        if self.state.refused_in_a_row >= limit:
            raise RuntimeError(
                f"{limit} steps in a row had a non-finite loss or gradient; the last good checkpoint is in "
                f"{self.config.run.output_dir}/checkpoints. Lower optimizer.learning_rate, or look at the data"
            )


def train(config: PretrainConfig, data: TrainingData, device: DeviceInfo) -> int:
    """Train from the newest checkpoint of the run's folder, or from the start, to the last step.

    Returns:
        0 when the last step is done, REQUEUE_EXIT_CODE when the run was asked to stop and has saved.

    Raises:
        UserError: the checkpoint does not fit the configuration.
        RuntimeError: too many steps in a row were refused for non-finite values.
    """
    trainer = build_trainer(config, data, device)
    try:
        with StopSignal() as stop:
            finished = run_steps(trainer, device, stop)
    except BaseException:
        trainer.telemetry.close("failed", trainer.state.step)
        raise
    trainer.telemetry.close("finished" if finished else "stopped", trainer.state.step)
    return 0 if finished else REQUEUE_EXIT_CODE


def run_steps(trainer: Trainer, device: DeviceInfo, stop: StopSignal) -> bool:
    """Train to the last step, or until a stop is asked for; the state is saved when this returns.

    Returns:
        Whether the last step is done.
    """
    config = trainer.config
    settings, state, telemetry = config.training, trainer.state, trainer.telemetry
    if state.step == 0 and settings.save_initial:
        trainer.save()
    # The position in the data is the step number: nothing of the loader is stored or restored.
    steps = iterate_steps(
        trainer.batches,
        state.step,
        settings.steps,
        config.data.workers,
        config.data.prefetch_steps,
        pin_memory=device.device.type == "cuda",
    )
    watch = Stopwatch()
    while state.step < settings.steps:
        step = next(steps)
        # Time since the end of the last step: waiting for data.
        data_seconds = watch.lap()
        rate = learning_rate(state.step, config.optimizer, settings.steps)
        # A pure function of the step, so a resume needs no scheduler state.
        set_learning_rate(trainer.optimizer, rate, config.optimizer.weight_decay)
        result = train_step(trainer.model, trainer.optimizer, step.batches, stop.requested)
        trainer.count(result)
        telemetry.log_step(
            StepMetrics(
                step=state.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=rate,
                step_seconds=data_seconds + watch.lap(),
                data_seconds=data_seconds,
                samples=step.samples,
                tokens=step.tokens,
                flops=step.flops,
                refused=result.refused,
                loss_by_time=mean_by_time(result.loss_sums_by_time, result.positions_by_time),
                positions_by_time=result.positions_by_time,
            )
        )
        # result.stop_requested, not stop.requested: all ranks leave at the same step.
        if result.stop_requested or state.step % settings.save_every == 0 or state.step == settings.steps:
            trainer.save()
            # Saving is not part of the next step's time.
            watch.lap()
        if result.stop_requested:
            break
    return state.step >= settings.steps


def build_trainer(config: PretrainConfig, data: TrainingData, device: DeviceInfo) -> Trainer:
    """Build data order, model and optimizer, and bring them to where the run stands."""
    check_position_count(config, data)
    plan = DataPlan(data.buckets, config.data, config.run.seed, config.run.stage)
    # Everything that decides which samples make step k; stored with the checkpoint and compared on resume.
    identity = {"data set": data.fingerprint(), **plan.identity()}
    found = checkpoint.agree_on_newest(Path(config.run.output_dir) / "checkpoints")
    # Before the model is built: a refusal should come in the first seconds.
    if found is not None:
        checkpoint.check_same_model(found, config.model)
        checkpoint.check_same_data_plan(found, identity)
    chunks = build_dit(
        config.model,
        config.parallel,
        DTYPES[config.training.precision],
        device=device.device,
        init_seed=config.run.seed,
        fp8=config.fp8,
    )
    # Before the optimizer is built, whose fp32 copies are taken from the weights.
    if found is None and config.run.initial_weights is not None:
        checkpoint.load_model_weights(checkpoint.find_checkpoint(config.run.initial_weights), chunks)
    model = wrap_data_parallel(chunks, config.parallel)
    optimizer = build_optimizer(model, config.optimizer, config.parallel)
    ema = None if config.ema.decay is None else EMA(optimizer, config.ema.decay)
    state = checkpoint.load_checkpoint(found, model, optimizer, ema) if found else TrainState(data_plan=identity)
    telemetry = start_telemetry(config, state.step)
    # On all ranks: counting parameters is a collective.
    for line in describe_run(config, data, plan, model):
        telemetry.say(line)
    for line in describe_changes(config, found, state):
        telemetry.say(line)
    batches = replica_batches(config, data, plan)
    return Trainer(config, data, plan, model, optimizer, state, telemetry, batches, ema)


def check_position_count(config: PretrainConfig, data: TrainingData) -> None:
    """megatron-core adds up the latent positions of a step in int32, and context-parallel ranks each count them.

    Raises:
        UserError: a step could have more of them than an int32 holds.
    """
    sizes, single = config.data.bucket_micro_batch_sizes, config.data.micro_batch_size
    largest = max(shape.tokens * sizes.get(name, single) for name, shape in data.shapes.items())
    count = largest * config.data.micro_batches_per_step * config.parallel.context_parallel_size
    if count >= 2**31:
        raise UserError(
            f"a step of data.global_batch_size={config.data.global_batch_size} could have {count:,} latent positions "
            f"(times context_parallel_size={config.parallel.context_parallel_size}), more than the 2,147,483,647 that "
            "megatron-core can count; lower data.global_batch_size"
        )


def replica_batches(config: PretrainConfig, data: TrainingData, plan: DataPlan) -> StepBatches:
    """This replica's batches, by step."""
    builder = BatchBuilder(
        data=data,
        noise=NoiseSource(config.run.seed, config.run.stage),
        density=config.flow,
        text_dropout=config.data.text_dropout,
        text_dtype=DTYPES[config.training.precision],
        model=config.model,
    )
    return StepBatches(builder, plan, data_parallel_rank(), data_parallel_size())


def start_telemetry(config: PretrainConfig, first_step: int) -> Telemetry:
    """Open the run's records; rank 0 keeps them."""
    world = torch.distributed.get_world_size()
    peak = config.training.peak_tflops
    return Telemetry(
        Path(config.run.output_dir),
        config,
        first_step,
        config.training.steps,
        config.training.log_every,
        peak_flops=None if peak is None else peak * 1e12 * world,
        active=torch.distributed.get_rank() == 0,
    )
