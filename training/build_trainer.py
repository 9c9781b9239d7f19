"""Everything of a run before its first step: data order, model, optimizer, and where the run stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.utils import get_model_config

from megatron_video.device import DeviceInfo
from megatron_video.dit import build_dit
from megatron_video.errors import UserError
from megatron_video.noise import NoiseSource
from megatron_video.parallel import data_parallel_rank, data_parallel_size
from training import checkpoint
from training.checkpoint import TrainState
from training.checkups import Checkups
from training.config import PretrainConfig
from training.data import BatchBuilder, StepBatches
from training.data_plan import DataPlan
from training.data_set import TrainingData
from training.density_plot import show_density
from training.ema import build_ema
from training.events import EventLog, read_events
from training.fault_config import describe_limits
from training.initial_state import take_initial_optimizer, take_initial_weights
from training.optimizer import build_optimizer, wrap_data_parallel
from training.phases import Phases
from training.preference import describe_preference, preference_identity, prepare_reference
from training.preference_data import PairBatchBuilder
from training.rank_table import RankTable
from training.run_plan import plan_run
from training.skipped_data import add_windows
from training.startup import describe_changes, describe_run
from training.stop_signal import StopSignal
from training.telemetry import Telemetry
from training.trained_encoders import encoders_of
from training.trainer import Trainer

# Names of training.precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_trainer(
    config: PretrainConfig, data: TrainingData, device: DeviceInfo, phases: Phases, ranks: RankTable
) -> Trainer:
    """Build data order, model and optimizer, and bring them to where the run stands."""
    plan = plan_run(config, data)
    check_position_count(config, data, plan.sizes.draw)
    # Everything that decides which samples make step k; stored with the checkpoint and compared on resume.
    identity = {"data set": data.fingerprint(), **plan.identity(), **preference_identity(config, data)}
    found = checkpoint.agree_on_newest(Path(config.run.output_dir) / "checkpoints", config.checkpoint)
    # Before the model is built: a refusal should come in the first seconds.
    if found is not None:
        checkpoint.check_has_optimizer(found)
        checkpoint.check_same_model(found, config.model)
        checkpoint.check_same_data_plan(found, identity)
    batches = replica_batches(config, data, plan)
    # Before the model is built: the text encoders of the samples need the room, and then give it up.
    checkups = Checkups(config, data, plain_builder(config, data), device)
    chunks = build_dit(
        config.model,
        config.parallel,
        DTYPES[config.training.precision],
        device=device.device,
        init_seed=config.run.seed,
        fp8=config.fp8,
    )
    # Before the model takes its own weights: the reference computes with this one.
    batches, reference = prepare_reference(config, identity, batches, chunks, lambda: phases.enter("start"))
    # Before the optimizer is built, whose fp32 copies are taken from the weights.
    if found is None:
        take_initial_weights(config.run, chunks)
    model = wrap_data_parallel(chunks, config.parallel)
    optimizer = build_optimizer(model, config.optimizer, config.parallel)
    # Before the averages start from the weights.
    if found is None:
        take_initial_optimizer(config.run, model, optimizer)
    ema = build_ema(config.ema, optimizer)
    state = checkpoint.load_checkpoint(found, model, optimizer, ema) if found else TrainState(data_plan=identity)
    # Also in a run that was begun before checkpoints said so.
    state.encoders = encoders_of(data.datasets[0].rows.info)
    state.skipped_data = add_windows(config.faults.skip_data_steps, state.skipped_data, state.step)
    telemetry = start_telemetry(config, state.step)
    # On all ranks: counting parameters is a collective.
    for line in describe_run(config, data, plan, model):
        telemetry.say(line)
    for line in describe_preference(config):
        telemetry.say(line)
    for line in checkups.describe():
        telemetry.say(line)
    for line in describe_changes(config, found, state):
        telemetry.say(line)
    if found is None:
        show_density(config, data, telemetry)
    events = start_events(config, found, state)
    stop = stop_signal(config)
    for line in describe_limits(config.faults, stop.deadline):
        telemetry.say(line)
    # Up to here a replica's time is its own; from here on it waits for the others.
    settings = get_model_config(model[0])
    settings.finalize_model_grads_func = phases.entering("reduce", settings.finalize_model_grads_func)
    return Trainer(
        config,
        data,
        plan,
        model,
        optimizer,
        state,
        telemetry,
        batches,
        ema,
        device,
        events,
        phases,
        stop,
        checkups,
        ranks,
        reference,
    )


def check_position_count(config: PretrainConfig, data: TrainingData, draw_sizes: Mapping[str, int]) -> None:
    """megatron-core adds up the latent positions of a step in int32, and context-parallel ranks each count them.

    Raises:
        UserError: a step could have more of them than an int32 holds.
    """
    draws, shapes = config.data.global_batch_size // config.data.samples_per_draw, data.shapes
    count = draws * max(shapes[name].tokens * size for name, size in draw_sizes.items())
    if config.data.images_per_video is not None:
        images = [name for name, shape in shapes.items() if shape.frames == 1]
        videos = draws * max(size for name, size in draw_sizes.items() if name not in images)
        count += int(videos * config.data.images_per_video + 1) * max(shapes[name].tokens for name in images)
    count *= config.parallel.context_parallel_size
    if count >= 2**31:
        raise UserError(
            f"a step of data.global_batch_size={config.data.global_batch_size} could have {count:,} latent positions "
            f"(times context_parallel_size={config.parallel.context_parallel_size}), more than the 2,147,483,647 that "
            "megatron-core can count; lower data.global_batch_size"
        )


def replica_batches(config: PretrainConfig, data: TrainingData, plan: DataPlan) -> StepBatches:
    """This replica's batches, by step; of pairs, without the reference's errors."""
    builder = plain_builder(config, data)
    if config.dpo is not None:
        builder = PairBatchBuilder(**vars(builder))
    rank, size = data_parallel_rank(), data_parallel_size()
    return StepBatches(builder, plan, rank, size, leave_out_corrupt=config.data.max_corrupt_samples > 0)


def plain_builder(config: PretrainConfig, data: TrainingData) -> BatchBuilder:
    """What makes batches of single samples."""
    return BatchBuilder(
        data=data,
        noise=NoiseSource(config.run.seed, config.run.stage),
        density=config.flow,
        text_dropout=config.data.text_dropout,
        text_dtype=DTYPES[config.training.precision],
        model=config.model,
    )


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


def start_events(config: PretrainConfig, found: Path | None, state: TrainState) -> EventLog:
    """Open events.jsonl and note how this life begins."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    events = EventLog(Path(config.run.output_dir), rank, world)
    if rank == 0 and found is None:
        events.record("start", state.step, world_size=world)
    elif rank == 0:
        events.record("resume", state.step, checkpoint=found, world_size=world)
    return events


def stop_signal(config: PretrainConfig) -> StopSignal:
    """What asks this job to stop; it knows how long saves of this run took in earlier lives."""
    stop = StopSignal(config.faults.deadline(), config.faults.wall_time_reserve)
    # One rank's word is enough for all to stop, so one rank reads.
    if torch.distributed.get_rank() == 0 and stop.deadline is not None:
        for event in read_events(Path(config.run.output_dir), "save"):
            stop.saw_save(event["seconds"])
    return stop
