"""What slow replicas cost on more and more GPUs, each cause alone and all together, beside a simulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from training.config import PretrainConfig
from training.planner.cluster import Cluster
from training.planner.cluster_life import Jitter
from training.planner.imbalance import dealt_loads
from training.planner.job import Job
from training.planner.mix import step_of
from training.planner.plan import Refusal, judge
from training.planner.report import Report, jitter_note, optional
from training.planner.scale import batch_of
from training.planner.stragglers import Floats, expected_slowest, loads_on_nodes, simulate_slowest
from training.planner.tables import Formats, Table

_FORMATS: Formats = {
    "gpus": lambda value: f"{value:,}",
    "replicas": optional(0),
    "loads": optional(4),
    "jitter": optional(4),
    "slow": optional(4),
    "all": optional(4),
    "simulated": optional(4),
    "error": optional(4),
    "mfu_percent": optional(2),
    "mfu_percent_waiting": optional(2),
    "refused": str,
}
_HEADS = {
    "loads": "unequal loads",
    "slow": "slow nodes",
    "error": "+-",
    "mfu_percent": "MFU %",
    "mfu_percent_waiting": "with all",
    "refused": "",
}
_STEPS_OF_A_JOB = 20


def straggler_report(
    config: PretrainConfig, cluster: Cluster, counts: Sequence[int], text_tokens: int, jobs: int, seed: int
) -> Report:
    """The configured layout on every number of GPUs, its batch growing with them.

    Args:
        config: of the run.
        cluster: on whose own number of GPUs the batch is as configured.
        counts: numbers of GPUs.
        text_tokens: visible text tokens of a sample.
        jobs: simulated, each on slow nodes of its own.
        seed: of the simulation.
    """
    rows = [_row(config, replace(cluster, gpus=gpus), cluster, text_tokens, jobs, seed) for gpus in counts]
    notes = [
        "columns are the slowest replica's own part of a step over the mean replica's: by the integral over the "
        f"distribution of the slowest, and simulated ({jobs} jobs of {_STEPS_OF_A_JOB} steps, seed {seed}) with its "
        "standard error",
        "unequal loads: samples dealt as in training (data.balance), in the planner's seconds, mean of three steps",
        "the batch grows with the GPUs; weights and gradients are exchanged when the slowest is done",
        jitter_note(cluster),
    ]
    return Report(f"Slowest replica: {config.run.stage}", [Table("Slowest over mean", rows, _FORMATS, _HEADS)], notes)


def _row(
    config: PretrainConfig, cluster: Cluster, full: Cluster, text_tokens: int, jobs: int, seed: int
) -> dict[str, Any]:
    batch = batch_of(config, full, cluster.gpus, "weak")
    config = replace(config, data=replace(config.data, global_batch_size=batch))
    found = judge(config, cluster, step_of(config, text_tokens), config.parallel, leave_idle=True)
    if isinstance(found, Refusal):
        return dict.fromkeys(_FORMATS) | {"gpus": cluster.gpus, "refused": found.kind}
    job, jitter = found.job, cluster.jitter
    loads = list(_placed(config, job))
    simulated = [simulate_slowest(jitter, load, _STEPS_OF_A_JOB, jobs, seed) for load in loads]
    factor = _mean_slowest(jitter, loads)
    equal = [np.sign(load) for load in loads]
    return {
        "gpus": cluster.gpus,
        "replicas": job.replicas,
        "loads": float(np.mean([load.max() for load in loads])),
        "jitter": _mean_slowest(replace(jitter, slow_nodes=0.0), equal),
        "slow": _mean_slowest(replace(jitter, spread=0.0), equal),
        "all": factor,
        "simulated": float(np.mean([found.mean for found in simulated])),
        # The same slow nodes for all steps' loads: their errors do not cancel.
        "error": float(np.mean([found.standard_error for found in simulated])),
        "mfu_percent": found.mfu_percent,
        "mfu_percent_waiting": found.mfu_percent * found.seconds.total / found.seconds_with_waits(factor),
        "refused": "",
    }


def _placed(config: PretrainConfig, job: Job) -> Iterator[Floats]:
    for load in dealt_loads(config, job):
        yield loads_on_nodes(load, job.parallel.model_parallel_size, job.cluster.gpus_per_node)


def _mean_slowest(jitter: Jitter, loads: Sequence[Floats]) -> float:
    return float(np.mean([expected_slowest(jitter, load) for load in loads]))
