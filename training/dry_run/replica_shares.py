"""How many micro-batches of a step each replica gets: of the run's data, or where there is none of made-up samples."""

from __future__ import annotations

from training.config import PretrainConfig
from training.data_plan import DataPlan
from training.run_plan import batch_sizes, dealing_costs
from training.sample_groups import GroupKey, SampleGroup
from training.simulate_balance import Numbered, flops_of

# Enough for any step to be drawn from one epoch.
_SAMPLES_OF_A_BUCKET = 10_000_000


def micro_batches_of_replicas(plan: DataPlan, replicas: int) -> list[int]:
    """Micro-batches of every replica in the first step."""
    if plan.costs is None:
        batches = plan.step(0)
        return [len(plan.deal(batches, rank, replicas)) for rank in range(replicas)]
    counts: list[int] = plan.dealing(0, replicas).micro_batches.tolist()
    return counts


def plan_without_data(config: PretrainConfig) -> DataPlan | None:
    """The plan of a run as if every bucket had equally many samples; None where no buckets are named.

    Raises:
        UserError: shares and sizes that name other buckets, or leave nothing to draw.
    """
    buckets = config.data.buckets
    if not buckets:
        return None
    groups: dict[GroupKey, SampleGroup] = {("made up", name): Numbered(_SAMPLES_OF_A_BUCKET) for name in buckets}
    costs = dealing_costs(config, flops_of(config, buckets).sample)
    sizes = batch_sizes(config, groups, None)
    return DataPlan(groups, config.data, config.run.seed, config.run.stage, None, sizes, costs)
