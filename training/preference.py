"""What a run on preference pairs has beside a run on samples: its objective by step, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_video.config_io import config_to_dict
from megatron_video.dit import VideoDiT
from megatron_video.errors import UserError
from training.config import PretrainConfig
from training.data import Batch, StepBatches
from training.data_plan import DataPlan
from training.data_set import TrainingData
from training.preference_config import PreferenceConfig
from training.preference_data import PairBatch, PairBatchBuilder
from training.preference_loss import Objective
from training.reference_pass import PrecomputedReference, Reference, RunReference, SwappedReference
from training.sample_ranks import decided_by_rank_0
from training.trained_encoders import encoders_of, trained_encoders

# Name of the reference's fingerprint in what a run must not change.
REFERENCE = "dpo reference"


def objective_of(preference: PreferenceConfig, step: int, steps: int) -> Objective:
    """The objective of a step, counted from 0, of a run of so many."""
    beta = preference.beta_at(step, steps)
    return Objective(preference.loss, beta, preference.label_smoothing, preference.sft_weight)


def preference_identity(config: PretrainConfig, data: TrainingData) -> dict[str, Any]:
    """What a run on pairs must not change when it is continued, by name; {} for a run on samples.

    All ranks call it together: one of them reads the reference's files.

    Raises:
        UserError: there is no such reference, or it was trained with other encoders than the pairs were made with.
    """
    if config.dpo is None:
        return {}
    # Where the reference's errors come from changes no number.
    fields = {f"dpo.{name}": value for name, value in config_to_dict(config.dpo).items() if name != "reference"}
    for name in ("dpo.reference_weights", "dpo.reference_from_ema"):
        del fields[name]
    return {**fields, REFERENCE: decided_by_rank_0(lambda: _fingerprint(config, data))}


def _fingerprint(config: PretrainConfig, data: TrainingData) -> str:
    reference = Reference.of(config)
    reference.check(config.model)
    made_with = encoders_of(data.datasets[0].rows.info)
    for name, trained in trained_encoders(reference.checkpoint).items():
        if trained != made_with[name]:
            raise UserError(
                f"data.shards={data.folders}: made with other encoders ({name}: {made_with[name]}) than those "
                f"that the reference {reference.checkpoint} was trained with ({trained}), so their latents mean "
                "nothing to it; make pairs with `megatron-video dpo generate` from a model of its line"
            )
    return reference.fingerprint()


def prepare_reference(
    config: PretrainConfig,
    identity: Mapping[str, Any],
    batches: StepBatches,
    chunks: list[VideoDiT],
    working: Callable[[], None],
) -> tuple[StepBatches, RunReference | None]:
    """Have the reference's errors, or the reference; the model may hold its weights afterwards. On all ranks together.

    Args:
        config: of the run.
        identity: of `preference_identity`.
        batches: without the reference's errors.
        chunks: the model, before it takes its own weights.
        working: called at every sign of progress; a pass may take hours.

    Returns:
        The run's batches, and what their steps ask; None for a run on samples.

    Raises:
        UserError: stored errors of something else, or a reference that does not fit the model.
    """
    builder = batches.builder
    if config.dpo is None:
        return batches, None
    assert isinstance(builder, PairBatchBuilder)
    reference = Reference.of(config)
    if config.dpo.reference == "swapped":
        reference.load_into(chunks)
        return batches, SwappedReference(chunks)
    what = _error_identity(config, identity[REFERENCE], builder.data.fingerprint(), batches.plan)
    precomputed = PrecomputedReference(config, reference, what, batches, working)
    precomputed.compute_missing(range(config.training.steps), chunks)
    builder = replace(builder, references=precomputed.errors)
    return StepBatches(builder, batches.plan, batches.rank, batches.size), precomputed


def with_objective(config: PretrainConfig, step: int, batches: Sequence[Batch]) -> list[Batch]:
    """Micro-batches of training step `step`, counted from 0, with its objective; those of samples as they are.

    Here and not in the loader: where data was left out, a step's data is that of a later one, its beta is not.
    """
    if config.dpo is None:
        return list(batches)
    objective = objective_of(config.dpo, step, config.training.steps)
    return [replace(batch, objective=objective) if isinstance(batch, PairBatch) else batch for batch in batches]


def _error_identity(
    config: PretrainConfig, reference_fingerprint: str, data_fingerprint: str, plan: DataPlan
) -> dict[str, Any]:
    """All that the reference's errors depend on."""
    return {
        "reference": reference_fingerprint,
        "data set": data_fingerprint,
        "seed": config.run.seed,
        "stage": config.run.stage,
        "time density": repr(config.flow),
        "text dropout": config.data.text_dropout,
        "precision": config.training.precision,
        "order": plan.identity()["scheme"],
    }


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
