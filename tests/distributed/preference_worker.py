"""Training on preference pairs, on every rank of a layout; run on the ranks of a pool."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny_shards import MODEL_OVERRIDES

from megatron_video.config_io import load_config
from megatron_video.dit import build_dit
from megatron_video.errors import UserError
from training import build_trainer, checkpoint
from training.config import PretrainConfig
from training.data import Batch, StepBatches
from training.preference_data import PairBatch
from training.pretrain import run_training

SETTINGS = [
    *MODEL_OVERRIDES,
    "model.num_layers=4",
    "model.num_attention_heads=4",
    "run.seed=3",
    "data.micro_batch_size=1",
    "data.global_batch_size=8",
    "data.draw_size=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=2",
    "training.precision=fp32",
    "training.log_every=1",
]


def train(overrides: list[str]) -> str | None:
    """Train on this rank; the refusal, if there is one."""
    try:
        run_training(load_config(PretrainConfig, None, [*SETTINGS, *overrides]), keep_distributed=True)
    except UserError as error:
        return str(error)
    return None


class ResidentReference:
    """What Megatron-Video avoids: a second model beside the trained one, which predicts in every step."""

    def __init__(self, config: PretrainConfig) -> None:
        self._model = build_dit(config.model, config.parallel, torch.float32, device=torch.device("cpu"), init_seed=7)[
            0
        ]
        weights = checkpoint.find_checkpoint(str(config.run.initial_weights))
        checkpoint.load_model_weights(weights, [self._model])

    def make_ready(self, model: list[Any], steps: Sequence[int]) -> None:
        """It always is."""

    @torch.no_grad()
    def with_errors(self, model: list[Any], batches: list[Batch]) -> list[Any]:
        """Squared errors in plain code, without the project's functions."""
        assert not set(model[0].parameters()) & set(self._model.parameters())
        pairs = (batch for batch in batches if isinstance(batch, PairBatch))
        return [replace(batch, reference_errors=self._errors(batch)) for batch in pairs]

    def _errors(self, batch: PairBatch) -> torch.Tensor:
        texts = (batch.llm_states, batch.clip_states, batch.text_lengths)
        velocity = self._model(batch.latents, batch.timestep, *texts, dropout_seeds=None)
        squares = (velocity.float() - batch.target) ** 2
        return torch.stack(squares.flatten(1).mean(1).chunk(2))

    def in_place(self, model: list[Any]) -> Any:
        """Not needed here."""
        return nullcontext()


def train_beside_a_resident_reference(overrides: list[str]) -> str | None:
    """`train`, on one rank, with a reference of its own."""

    def prepare(config: PretrainConfig, _: Any, batches: StepBatches, *__: Any) -> tuple[StepBatches, Any]:
        return batches, ResidentReference(config)

    with patch.object(build_trainer, "prepare_reference", prepare):
        return train(overrides)


def train_where_others_see_no_errors(overrides: list[str]) -> str | None:
    """`train` as on a network file system that shows the reference's errors to the node that wrote them alone."""
    if dist.get_rank() == 0:
        return train(overrides)
    _Blindness.on = True
    try:
        return train(overrides)
    finally:
        _Blindness.on = False


class _Blindness:
    on = False


def _see_nothing(event: str, arguments: tuple[Any, ...]) -> None:
    looks = event in ("open", "os.listdir", "os.scandir", "glob.glob")
    if _Blindness.on and looks and "reference_errors" in str(arguments[0]):
        raise FileNotFoundError(arguments[0])


# Hooks stay for the life of a process.
sys.addaudithook(_see_nothing)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Loss, gradient norm and measures of every step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{"loss": line["loss"], "grad_norm": line["grad_norm"], **line.get("preference", {})} for line in lines]
