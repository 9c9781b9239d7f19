"""The plan of a run: which samples make step k and how they are shared out, from its configuration and its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from megatron_video.buckets import parse_bucket
from megatron_video.dit.config import DiTConfig
from megatron_video.flops import training_flops
from training.balance_cost import Costs, coarse_sizes, read_profile
from training.config import PretrainConfig
from training.data_mix import bucket_shares, group_shares
from training.data_plan import DataPlan, check_bucket_names, configured_sizes, split_images
from training.sample_groups import GroupKey, SampleGroup

if TYPE_CHECKING:
    from training.data_set import TrainingData

# Caption lengths differ; so many samples of a bucket give the mean well enough.
_SAMPLES_FOR_MEAN = 1000


def plan_run(config: PretrainConfig, data: TrainingData) -> DataPlan:
    """Order and shares of the run's data.

    Raises:
        UserError: shares, sizes or seconds that name other buckets than those in use, or that leave nothing to draw.
    """
    weights = dict(zip(data.sources, data.source_weights, strict=True)) if data.source_weights else None
    groups = data.groups()
    return DataPlan(
        groups,
        config.data,
        config.run.seed,
        config.run.stage,
        weights,
        micro_batch_sizes(config, groups, weights),
        dealing_costs(config, mean_flops(config.model, data)),
    )


def micro_batch_sizes(
    config: PretrainConfig, groups: Mapping[GroupKey, SampleGroup], source_weights: Mapping[str, float] | None
) -> dict[str, int]:
    """Micro-batch size of every bucket in use, as given or computed.

    Raises:
        UserError: shares or sizes that name other buckets than those in use, or that leave nothing to draw.
    """
    in_use = sorted({bucket for _, bucket in groups})
    check_bucket_names(in_use, config.data)
    if config.data.bucket_micro_batch_sizes != "auto":
        return configured_sizes(in_use, config.data)
    drawn, _ = split_images(groups, config.data)
    shares = bucket_shares(group_shares(drawn, source_weights, config.data.bucket_weights))
    return automatic_sizes(config.model, in_use, shares, config.data.micro_batch_size)[0]


def automatic_sizes(
    model: DiTConfig, in_use: list[str], shares: Mapping[str, float], micro_batch_size: int
) -> tuple[dict[str, int], float]:
    """Micro-batch size of every bucket in use, and alpha, from the model and the buckets alone.

    Not from measured seconds: the order of the data depends on the sizes, and seconds change with the machine.
    """
    tokens = {name: parse_bucket(name).latent_shape.tokens // model.patch_size**2 for name in in_use}
    flops = {name: float(training_flops(model.num_layers, model.hidden_size, n)) for name, n in tokens.items()}
    # Equal FLOPs of short samples are more tokens, which is more memory; so many fit with fixed sizes too.
    most = micro_batch_size * max(tokens[name] for name in shares)
    bounds = {name: max(1, most // count) for name, count in tokens.items()}
    return coarse_sizes(flops, shares, micro_batch_size, bounds)


def dealing_costs(config: PretrainConfig, flops: Mapping[str, float]) -> Costs | None:
    """By what micro-batches are shared out; None where they are dealt out in turn.

    Args:
        config: of the run.
        flops: mean FLOPs of a sample of every bucket in use.
    """
    if not config.layout().balances_cost:
        return None
    profile = config.data.cost_profile
    return Costs.of_flops(flops) if profile is None else read_profile(profile, list(flops))


def mean_flops(model: DiTConfig, data: TrainingData) -> dict[str, float]:
    """FLOPs of forward and backward on a sample of every bucket, with captions of the bucket's mean length.

    Means and not the length of every caption: a micro-batch is padded to its longest caption, so that single lengths
    say little of its time, and the index need not be read for samples of other replicas.
    """
    return {bucket: _mean_flops(model, data, bucket, group) for bucket, group in data.buckets.items()}


def _mean_flops(model: DiTConfig, data: TrainingData, bucket: str, group: SampleGroup) -> float:
    # Spread over the group: neighbours may come from one film.
    places = np.unique(np.linspace(0, len(group) - 1, min(len(group), _SAMPLES_FOR_MEAN)).astype(np.int64))
    return data.flops(model, bucket, group[places]) / len(places)
