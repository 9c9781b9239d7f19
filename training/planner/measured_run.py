"""A short real training run on this machine: the bytes that its tensors hold, beside what the planner says of them."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace

import torch

from megatron_video.device import DeviceInfo, initialize
from megatron_video.parallel import destroy_parallel, initialize_parallel, rank_grid
from training.build_trainer import build_trainer
from training.config import PretrainConfig
from training.data import StepData
from training.data_set import TrainingData
from training.local_ranks import Device, RankPool
from training.phases import Phases
from training.planner.cluster import load_cluster
from training.planner.job import Job
from training.planner.memory import Memory, peak_memory
from training.planner.memory_trace import MemoryTrace, Section, trace_memory
from training.planner.mix import step_of
from training.planner.shape import ModelShape
from training.rank_table import gather_rank_table
from training.train_step import train_step
from training.trainer import Trainer

# Bandwidths and peaks of no account here.
_ANY_CLUSTER = "h100"


@dataclass(frozen=True)
class Measured:
    """Of one rank, in its last step."""

    state: int
    """Held between backward and update: weights, gradients, optimizer, averages."""
    peak: int
    """Most held at one moment."""
    phase: str
    """Of the step, in which that was."""


@dataclass(frozen=True)
class Compared:
    """One rank beside the planner."""

    rank: int
    stage: int
    """Of the pipeline."""
    predicted: Memory
    measured: Measured

    @property
    def residual_percent(self) -> float:
        """Of the prediction, over what was measured."""
        return 100 * (self.predicted.total / self.measured.peak - 1)

    @property
    def state_residual_percent(self) -> float:
        """The same of what is there between steps."""
        return 100 * (self.predicted.model_state / self.measured.state - 1)


def compare(pool: RankPool, config: PretrainConfig, ranks: int, text_tokens: int) -> list[Compared]:
    """Train on the pool's first `ranks` ranks, and let the planner predict each."""
    predicted = predict(config, ranks, text_tokens, pool.device)
    stages = rank_grid(config.parallel, ranks).flatten(1)
    return [
        Compared(rank, stage, predicted[stage], measured)
        for rank, measured in enumerate(pool.run(measure, config, ranks=ranks))
        for stage in [int((stages == rank).any(1).nonzero()[0, 0])]
    ]


def predict(config: PretrainConfig, ranks: int, text_tokens: int, device: Device) -> list[Memory]:
    """Memory of every pipeline stage, by the planner, for the kernels that run on `device`."""
    return peak_memory(
        Job(
            ModelShape.of(config.model),
            config.parallel,
            replace(load_cluster(_ANY_CLUSTER), gpus=ranks),
            step_of(config, text_tokens),
            config.training.precision,
            ema=config.ema.decay is not None and config.ema.device == "same",
            optimizer_on_host=config.optimizer.cpu_offload,
            fused=device == "cuda",
        )
    )


def measure(config: PretrainConfig) -> Measured:
    """Train all steps of `config`, on every rank of a layout together, without checkpoints."""
    device, data = initialize(), TrainingData.open(config.data, pairs=config.dpo is not None)
    initialize_parallel(config.parallel, config.run.seed, device)
    try:
        # What a run tells of itself is not wanted here.
        with contextlib.redirect_stdout(io.StringIO()), trace_memory(device.device) as trace:
            waiting = _train(config, data, device, trace)
        return _last_step(trace.sections, waiting)
    finally:
        destroy_parallel(keep_distributed=True)


def _train(config: PretrainConfig, data: TrainingData, device: DeviceInfo, trace: MemoryTrace) -> int:
    """Returns the bytes of the batches that wait."""
    phases = Phases(device.device)
    trainer = build_trainer(config, data, device, phases, gather_rank_table())
    # All built before the first step, so that their number does not depend on how fast they are read.
    steps = list(trainer.steps_from_here())
    phases.listeners.append(trace.mark)
    for step in steps:
        _step(trainer, step)
    trainer.close("finished", "measured")
    return _bytes_of(steps, device.device)


def _step(trainer: Trainer, step: StepData) -> None:
    trainer.next_learning_rate()
    batches = trainer.with_reference(step.batches)
    result = train_step(trainer.model, trainer.optimizer, batches, trainer.stop.flags(), trainer.phases)
    trainer.phases.enter("report")
    trainer.count(step, result)


def _bytes_of(steps: list[StepData], device: torch.device) -> int:
    """Of batches that lie on `device`: in a run on a GPU they wait in host memory, on the CPU that is the same."""
    batches = (batch for step in steps for batch in step.batches)
    tensors = (value for batch in batches for value in vars(batch).values() if isinstance(value, torch.Tensor))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device.type == device.type)


def _last_step(sections: list[Section], waiting: int) -> Measured:
    # A reference may compute before the step's own forward pass, in the same phase.
    before = [place for place, section in enumerate(sections) if section.name == "report"][:-1]
    begun = before[-1] + 1 if before else 0
    last = [section for section in sections[begun:] if section.name != "checkpoint"]
    fullest = max(last, key=lambda section: section.peak)
    state = next(section.start for section in last if section.name == "agree")
    return Measured(state - waiting, fullest.peak - waiting, fullest.name)
