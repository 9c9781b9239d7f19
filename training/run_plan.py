"""The plan of a run: which samples make step k and how they are shared out, from its configuration and its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from megatron_video.buckets import parse_bucket
from megatron_video.dit.config import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from training.balance_cost import Costs, coarse_sizes, read_profile
from training.config import PretrainConfig
from training.data_config import DataConfig
from training.data_mix import bucket_shares, group_shares
from training.data_plan import BatchSizes, DataPlan, check_bucket_names, configured_sizes, split_images
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
        batch_sizes(config, groups, weights),
        dealing_costs(config, mean_flops(config.model, data)),
    )


def batch_sizes(
    config: PretrainConfig, groups: Mapping[GroupKey, SampleGroup], source_weights: Mapping[str, float] | None
) -> BatchSizes:
    """Sizes of draws and micro-batches of every bucket in use, as given or computed.

    Raises:
        UserError: shares or sizes that name other buckets than those in use, that leave nothing to draw, or computed
            draws of several micro-batches where replicas need equally many.
    """
    in_use = sorted({bucket for _, bucket in groups})
    check_bucket_names(in_use, config.data)
    if config.data.bucket_micro_batch_sizes != "auto":
        return configured_sizes(in_use, config.data)
    drawn, _ = split_images(groups, config.data)
    shares = bucket_shares(group_shares(drawn, source_weights, config.data.bucket_weights))
    sizes, _ = automatic_sizes(config.model, in_use, shares, config.data)
    if not config.layout().balances_cost:
        _check_single_micro_batches(config, sizes, list(shares))
    return sizes


def automatic_sizes(
    model: DiTConfig, in_use: Iterable[str], shares: Mapping[str, float], data: DataConfig
) -> tuple[BatchSizes, float]:
    """Draws of about equal cost, micro-batches that fit into memory, and alpha: from the model and the buckets alone.

    Not from measured seconds: the order of the data depends on the draws, and seconds change with the machine.

    Args:
        model: by whose cost.
        in_use: buckets.
        shares: of the drawn samples by bucket, for those that are drawn and do not come on top.
        data: its draw_size and micro_batch_size.
    """
    tokens = tokens_of(model, in_use)
    flops = {name: float(training_flops(model.num_layers, model.hidden_size, n)) for name, n in tokens.items()}
    draws, alpha = coarse_sizes(flops, shares, data.samples_per_draw)
    # So many tokens fit with fixed sizes too. Equal FLOPs of short samples would be more.
    most = data.micro_batch_size * max(tokens[name] for name in shares)
    return BatchSizes(draws, {name: max(1, most // count) for name, count in tokens.items()}, whole_draws=True), alpha


def _check_single_micro_batches(config: PretrainConfig, sizes: BatchSizes, drawn: list[str]) -> None:
    cut = {name: sizes.draw[name] for name in drawn if sizes.draw[name] > sizes.micro_batch[name]}
    if cut:
        raise UserError(
            f"data.bucket_micro_batch_sizes=auto: draws of {cut} samples take more than one micro-batch, and "
            "dealt in turn every replica needs equally many"
            f"{config.layout().and_why_equally_many}; give sizes by bucket, or raise data.micro_batch_size"
        )


def tokens_of(model: DiTConfig, buckets: Iterable[str]) -> dict[str, int]:
    """Video tokens of a sample of every bucket."""
    return {name: parse_bucket(name).latent_shape.tokens // model.patch_size**2 for name in buckets}


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
