"""How unequally a step's samples load the replicas: dealt as training deals them, in the planner's seconds."""

from __future__ import annotations

from dataclasses import replace

from training.balance import Floats, loads_in_turn
from training.balance_cost import Costs
from training.config import PretrainConfig
from training.data_plan import DataPlan
from training.planner.job import Job
from training.planner.step_time import micro_batch_seconds
from training.planner.stragglers import expected_slowest, loads_on_nodes
from training.planner.work import MicroBatch
from training.run_plan import batch_sizes, dealing_costs, tokens_of
from training.sample_groups import GroupKey, SampleGroup
from training.simulate_balance import Numbered, flops_of

# Steps over which loads are looked at: they differ little, as every step has the same number of draws.
_STEPS = 3
_SAMPLES_OF_A_BUCKET = 10_000_000


def dealt_loads(config: PretrainConfig, job: Job, steps: int = _STEPS) -> list[Floats]:
    """[replicas] of the first steps: every replica's load over the mean, by the planner's seconds.

    Replicas are dealt their samples as in training (data.balance), by FLOPs. No data is read: buckets are drawn by
    data.bucket_weights, or all alike.

    Args:
        config: of the run.
        job: it with its layout on a cluster.
        steps: how many.
    """
    config = replace(config, parallel=job.parallel)
    buckets = list(config.data.buckets or [])
    groups: dict[GroupKey, SampleGroup] = {("made up", name): Numbered(_SAMPLES_OF_A_BUCKET) for name in buckets}
    costs = dealing_costs(config, flops_of(config, buckets).sample)
    sizes = batch_sizes(config, groups, None)
    plan = DataPlan(groups, config.data, config.run.seed, config.run.stage, None, sizes, costs)
    seconds = _seconds_of_samples(config, job)
    replicas = round(job.replicas)
    loads = [
        loads_in_turn(plan.step(step), replicas, seconds)
        if costs is None
        else plan.dealing(step, replicas).loads_by(seconds)
        for step in range(steps)
    ]
    return [load / load.mean() for load in loads]


def slowest_factors(config: PretrainConfig, job: Job) -> tuple[float, float]:
    """How much longer a step's own work takes the slowest replica than the mean one.

    Returns:
        By unequal loads alone, and by them, jitter and slow nodes together.
    """
    cluster = job.cluster
    loads = dealt_loads(config, job)
    placed = [loads_on_nodes(load, job.parallel.model_parallel_size, cluster.gpus_per_node) for load in loads]
    together = [expected_slowest(cluster.jitter, load) for load in placed]
    return sum(float(load.max()) for load in loads) / len(loads), sum(together) / len(together)


def _seconds_of_samples(config: PretrainConfig, job: Job) -> Costs:
    text = next(iter(job.step)).text_tokens
    tokens = tokens_of(config.model, config.data.buckets or [])
    seconds = {name: micro_batch_seconds(job, MicroBatch(1, count, text)).busy for name, count in tokens.items()}
    return Costs("s", seconds, dict.fromkeys(seconds, 0.0))
