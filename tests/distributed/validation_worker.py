"""What a rank does in the tests of validation: a small model in some layout, held-out shards, a few training steps."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from megatron.core.utils import to_local_if_dtensor

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.flow_matching import TimeDensity
from megatron_video.noise import NoiseSource
from megatron_video.parallel import ParallelConfig, initialize_parallel
from training.averaged_weights import averaged_weights, finish_parameter_gathers
from training.config import AdamWConfig
from training.data import BatchBuilder
from training.data_plan import PlannedBatch
from training.data_set import TrainingData
from training.ema import EMA
from training.layout_matrix.worker import _leave_no_zero
from training.main_parameters import main_parameters
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import train_step
from training.validation import Validation
from training.validation_config import ValidationConfig

MODEL = DiTConfig(
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    caption_channels=[16, 8],
)
SETTINGS = AdamWConfig(learning_rate=1e-2, eps=1e-4, clip_grad_norm=1.0)


class Run:
    """A model in `parallel` and its averages, trained on the held-out shards themselves."""

    def __init__(
        self,
        parallel: dict[str, Any],
        shards: str,
        dtype: str,
        validation: dict[str, Any],
        kind: type[EMA] = EMA,
        dropout: float = 0.0,
    ) -> None:
        layout, info = ParallelConfig(**parallel), device.initialize()
        initialize_parallel(layout, seed=1, device_info=info)
        self.dit = replace(MODEL, hidden_dropout=dropout)
        chunks = build_dit(self.dit, layout, getattr(torch, dtype), device=info.device, init_seed=5)
        for chunk in chunks:
            _leave_no_zero(chunk, 5)
        self.model = wrap_data_parallel(chunks, layout)
        self.optimizer = build_optimizer(self.model, SETTINGS, layout)
        self.ema = kind(self.optimizer, 0.5)
        self.data = TrainingData([shards])
        self.builder = BatchBuilder(
            data=self.data,
            noise=NoiseSource(3, "pretrain"),
            density=TimeDensity(shift=2.0),
            text_dropout=0.5,
            text_dtype=getattr(torch, dtype),
            model=self.dit,
        )
        self.validation = Validation(ValidationConfig(shards=[shards], **validation), self.data, self.builder)

    def step(self) -> tuple[float, float]:
        """One update, the same on every replica."""
        bucket = self.validation.buckets[-1]
        samples = self.validation._samples(bucket)[:2]
        batch = self.builder.build(PlannedBatch(bucket, samples, samples * 0))
        set_learning_rate(self.optimizer, SETTINGS.learning_rate, SETTINGS.weight_decay)
        result = train_step(self.model, self.optimizer, [batch, batch])
        self.ema.update()
        return result.loss, result.grad_norm

    def weights(self) -> list[torch.Tensor]:
        """All that a step may move on this rank, copied."""
        # Else others' part of the last update is still to come.
        finish_parameter_gathers(self.model)
        # Megatron-FSDP gives gathered weights up: what comes of them shows in the next step.
        kept = [chunk for chunk in self.model if not chunk.ddp_config.use_megatron_fsdp]
        held = [parameter.detach().clone() for chunk in kept for parameter in chunk.parameters()]
        for item, average in zip(main_parameters(self.optimizer), self.ema.averages, strict=True):
            held += [to_local_if_dtensor(t.detach()).clone() for t in (item.main, average) if t is not None]
        return held


def validate(
    parallel: dict[str, Any],
    shards: str,
    dtype: str,
    validation: dict[str, Any],
    kind: type[EMA] = EMA,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """Losses before and after two steps, with the trained and with the averaged weights, and whether all came back."""
    run = Run(parallel, shards, dtype, validation, kind, dropout)
    report: dict[str, Any] = {"first": asdict(run.validation.run(run.model))}
    run.step()
    run.step()
    before = run.weights()
    report["trained"] = asdict(run.validation.run(run.model))
    with averaged_weights(run.model, run.optimizer, run.ema):
        report["moved"] = any(not torch.equal(a, b) for a, b in zip(run.weights(), before, strict=True))
        report["averaged"] = asdict(run.validation.run(run.model))
    after = run.weights()
    report["restored"] = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    report["next"] = run.step()
    return report


def step_without_validation(parallel: dict[str, Any], shards: str, dtype: str) -> tuple[float, float]:
    """The third step of a run that never validates."""
    run = Run(parallel, shards, dtype, {})
    run.step()
    run.step()
    return run.step()
