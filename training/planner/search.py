"""All layouts of a run on a cluster: judged, ranked, and the simplest among the good ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_video.parallel import ParallelConfig
from training.config import PretrainConfig
from training.planner.cluster import Cluster
from training.planner.plan import Plan, Refusal, judge, lay_out
from training.planner.step_time import step_seconds
from training.planner.work import MicroBatch

_CONTEXT = (1, 2, 3, 4, 6, 8)
_PIPELINE = (1, 2, 3, 4, 6, 8, 12, 16)
# Points of MFU that simplicity is worth: what the paper paid for it (arXiv 2502.10248, 6.2.2).
_WORTH = 1.0


@dataclass(frozen=True)
class Search:
    """What became of all layouts."""

    plans: list[Plan]
    """Those that work, fastest first."""
    refusals: list[Refusal]
    """The others."""

    @property
    def best(self) -> Plan | None:
        """The fastest; None if nothing works."""
        return self.plans[0] if self.plans else None

    @property
    def simplest(self) -> Plan | None:
        """With the fewest mechanisms among those at most a point of MFU below the fastest; of equals the faster."""
        if self.best is None:
            return None
        near = [plan for plan in self.plans if plan.mfu_percent >= self.best.mfu_percent - _WORTH]
        return min(near, key=lambda plan: plan.mechanisms)

    def refusal_counts(self) -> list[tuple[str, int, Refusal]]:
        """(kind, number of layouts, one of them), most first."""
        counts = Counter(refusal.kind for refusal in self.refusals)
        examples = {refusal.kind: refusal for refusal in reversed(self.refusals)}
        return [(kind, count, examples[kind]) for kind, count in counts.most_common()]

    def values(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "best": None if self.best is None else self.best.values(),
            "simplest_within_a_point": None if self.simplest is None else self.simplest.values(),
            "plans": [plan.values() for plan in self.plans],
            "refused": [refusal.values() for refusal in self.refusals],
        }


def search(config: PretrainConfig, cluster: Cluster, step: Mapping[MicroBatch, float]) -> Search:
    """Judge every layout, each with as few recomputed layers as fit."""
    found = [_fewest_recomputed(config, cluster, step, layout) for layout in layouts(config, cluster)]
    plans = sorted((plan for plan in found if isinstance(plan, Plan)), key=lambda plan: -plan.mfu_percent)
    return Search(plans, [refusal for refusal in found if isinstance(refusal, Refusal)])


def fastest_by_size(
    config: PretrainConfig, cluster: Cluster, step: Mapping[MicroBatch, float], sizes: int
) -> tuple[list[Plan], list[Refusal]]:
    """The fastest layout for each of the `sizes` numbers of GPUs a replica that come out fastest, and refusals.

    As by `search`, but layouts that would be slower even if they recomputed nothing are not looked at further.
    """
    refusals: list[Refusal] = []
    promising: list[tuple[float, ParallelConfig]] = []
    for layout in layouts(config, cluster):
        job = lay_out(config, cluster, step, recomputing(layout, 0), leave_idle=True)
        if isinstance(job, Refusal):
            refusals.append(job)
        else:
            promising.append((step_seconds(job).total, layout))
    best: dict[int, Plan] = {}
    for least, layout in sorted(promising, key=lambda found: found[0]):
        size = layout.model_parallel_size
        if len(best) >= sizes and least >= sorted(plan.seconds.total for plan in best.values())[sizes - 1]:
            break
        if size in best and least >= best[size].seconds.total:
            continue
        found = _fewest_recomputed(config, cluster, step, layout)
        if isinstance(found, Refusal):
            refusals.append(found)
        elif size not in best or found.seconds.total < best[size].seconds.total:
            best[size] = found
    return sorted(best.values(), key=lambda plan: plan.seconds.total)[:sizes], refusals


def layouts(config: PretrainConfig, cluster: Cluster) -> Iterator[ParallelConfig]:
    """Every size of tensor, context and pipeline parallelism and of chunks, with ZeRO-1, and with FSDP where it goes.

    Sequence parallelism and overlap are on wherever they can be; all else is as configured.
    """
    tensor = [
        size for size in range(1, min(cluster.gpus_per_node, 16) + 1) if config.model.num_attention_heads % size == 0
    ]
    for tp in tensor:
        for cp in _CONTEXT:
            for pp in _PIPELINE:
                plain = replace(
                    config.parallel,
                    tensor_model_parallel_size=tp,
                    sequence_parallel=tp > 1,
                    context_parallel_size=cp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=None,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=True,
                    overlap_param_gather=True,
                    use_megatron_fsdp=False,
                )
                yield from _variants(config, plain)


def _variants(config: PretrainConfig, plain: ParallelConfig) -> Iterator[ParallelConfig]:
    stages = plain.pipeline_model_parallel_size
    kinds = [plain]
    if plain.context_parallel_size > 1 and plain.cp_comm_type != "all_gather":
        kinds.append(replace(plain, cp_comm_type="all_gather"))
    for kind in kinds:
        yield kind
        if stages == 1:
            yield replace(
                kind,
                use_megatron_fsdp=True,
                use_distributed_optimizer=False,
                overlap_grad_reduce=False,
                overlap_param_gather=False,
            )
            continue
        for chunks in range(2, config.model.num_layers // stages + 1):
            if config.model.num_layers % (stages * chunks) == 0:
                yield replace(kind, virtual_pipeline_model_parallel_size=chunks)


def _fewest_recomputed(
    config: PretrainConfig, cluster: Cluster, step: Mapping[MicroBatch, float], layout: ParallelConfig
) -> Plan | Refusal:
    pieces = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
    most = max(1, config.model.num_layers // pieces)
    # More layers recomputed take less memory: halve the interval between too few and enough.
    enough = judge(config, cluster, step, recomputing(layout, most), leave_idle=True)
    too_few = -1
    if isinstance(enough, Refusal):
        return enough
    layers = most
    while layers - too_few > 1:
        middle = (too_few + layers) // 2
        found = judge(config, cluster, step, recomputing(layout, middle), leave_idle=True)
        if isinstance(found, Plan):
            layers, enough = middle, found
        else:
            too_few = middle
    return enough


def recomputing(layout: ParallelConfig, layers: int) -> ParallelConfig:
    """The layout with so many layers of every piece recomputed in full, and nothing else."""
    return replace(
        layout,
        recompute_granularity="full" if layers else None,
        recompute_num_layers=layers or None,
    )
