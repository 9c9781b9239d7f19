"""What Megatron-Video avoids: the reference as a second model beside the trained one. For tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from megatron_video.dit import build_dit
from training import build_trainer, checkpoint
from training.config import PretrainConfig
from training.data import Batch, StepBatches
from training.preference_data import PairBatch


class ResidentReference:
    """Predicts in every step; without stages of a pipeline."""

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


@contextmanager
def resident_reference() -> Iterator[None]:
    """Within it, runs on pairs are built with one."""

    def prepare(config: PretrainConfig, _: Any, batches: StepBatches, *__: Any) -> tuple[StepBatches, Any]:
        return batches, ResidentReference(config)

    with patch.object(build_trainer, "prepare_reference", prepare):
        yield
