"""What a run on preference pairs has beside a run on samples: its objective by step, and its reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from megatron_video.config_io import config_to_dict
from megatron_video.dit import VideoDiT
from training.config import PretrainConfig
from training.data import Batch, StepBatches, StepData
from training.preference_config import PreferenceConfig
from training.preference_data import PairBatch, PairBatchBuilder
from training.preference_loss import Objective
from training.reference_pass import Reference, SwappedReference, complete_reference_errors, open_reference_errors
from training.sample_videos import decided_by_rank_0

# Name of the reference's fingerprint in what a run must not change.
REFERENCE = "dpo reference"


class PairSteps(StepBatches):
    """Item k: the pairs of step k for one replica, with the objective of that step."""

    def __init__(self, batches: StepBatches, builder: PairBatchBuilder, config: PretrainConfig) -> None:
        super().__init__(builder, batches.plan, batches.rank, batches.size)
        assert config.dpo is not None
        self._preference, self._steps = config.dpo, config.training.steps

    def __getitem__(self, step: int) -> StepData:
        data, objective = super().__getitem__(step), objective_of(self._preference, step, self._steps)
        return replace(data, batches=list(_with_objective(data.batches, objective)))


def objective_of(preference: PreferenceConfig, step: int, steps: int) -> Objective:
    """The objective of a step, counted from 0, of a run of so many."""
    beta = preference.beta_at(step, steps)
    return Objective(preference.loss, beta, preference.label_smoothing, preference.sft_weight)


def preference_identity(config: PretrainConfig) -> dict[str, Any]:
    """What a run on pairs must not change when it is continued, by name; {} for a run on samples.

    All ranks call it together: one of them reads the reference's files.
    """
    if config.dpo is None:
        return {}
    # Where the reference's errors come from changes no number.
    fields = {f"dpo.{name}": value for name, value in config_to_dict(config.dpo).items() if name != "reference"}
    for name in ("dpo.reference_weights", "dpo.reference_from_ema"):
        del fields[name]
    reference = Reference.of(config)
    return {**fields, REFERENCE: decided_by_rank_0(reference.fingerprint)}


def prepare_reference(
    config: PretrainConfig, identity: Mapping[str, Any], batches: StepBatches, chunks: list[VideoDiT]
) -> tuple[StepBatches, SwappedReference | None]:
    """Have the reference's errors, or the reference; the model may hold its weights afterwards. On all ranks together.

    Args:
        config: of the run.
        identity: of `preference_identity`.
        batches: without the reference's errors.
        chunks: the model, before it takes its own weights.

    Returns:
        The run's batches, and what completes them in every step, if that is left to the steps.

    Raises:
        UserError: stored errors of something else, or a reference that does not fit the model.
    """
    builder = batches.builder
    if config.dpo is None:
        return batches, None
    assert isinstance(builder, PairBatchBuilder)
    if config.dpo.reference == "swapped":
        Reference.of(config).load_into(chunks)
        return PairSteps(batches, builder, config), SwappedReference(chunks)
    store = open_reference_errors(config, identity[REFERENCE], builder.data.fingerprint(), batches.plan)
    complete_reference_errors(config, store, batches.plan, builder, chunks, _say)
    return PairSteps(batches, replace(builder, references=store), config), None


def _with_objective(batches: Sequence[Batch], objective: Objective) -> Iterator[Batch]:
    for batch in batches:
        assert isinstance(batch, PairBatch)
        yield replace(batch, objective=objective)


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


def describe_preference(config: PretrainConfig) -> Iterator[str]:
    """Lines for the start of the run."""
    if config.dpo is not None:
        first, last = (objective_of(config.dpo, step, config.training.steps) for step in (0, config.training.steps - 1))
        beta = f"beta {first.beta:g}" + (f" to {last.beta:g}" if last != first else "")
        others = {name: value for name, value in asdict(first).items() if name not in ("loss", "beta") and value}
        reference = Reference.of(config)
        yield (
            f"preference: {config.dpo.loss}, {beta}{''.join(f', {name} {value:g}' for name, value in others.items())}; "
            f"reference {reference.checkpoint}{' (averaged)' if reference.averaged else ''}, {config.dpo.reference}"
        )
