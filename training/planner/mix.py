"""The micro-batches of a training step, from a run's configuration alone."""

from __future__ import annotations

import math

from megatron_video.errors import UserError
from training.config import PretrainConfig
from training.data_mix import is_image
from training.data_plan import BatchSizes, check_bucket_names, configured_sizes
from training.planner.work import MicroBatch
from training.run_plan import automatic_sizes, tokens_of


def step_of(config: PretrainConfig, text_tokens: int) -> dict[MicroBatch, float]:
    """Micro-batches of one step over all replicas, by kind, with their mean number.

    Raises:
        UserError: as `samples_of`.
    """
    found = samples_of(config)
    tokens = tokens_of(config.model, found)
    step: dict[MicroBatch, float] = {}
    for name, (count, size) in found.items():
        # A preference pair is two rows of a batch.
        batch = MicroBatch(size if config.dpo is None else 2 * size, tokens[name], text_tokens)
        # Landscape and portrait are one kind.
        step[batch] = step.get(batch, 0.0) + count / size
    return step


def samples_of(config: PretrainConfig) -> dict[str, tuple[float, int]]:
    """Bucket -> (mean samples of one step, samples of a micro-batch).

    Without the data nobody knows how many samples each bucket has: they are drawn by data.bucket_weights, or from all
    buckets alike.

    Raises:
        UserError: data.buckets is null, or shares and sizes name other buckets.
    """
    data = config.data
    if not data.buckets:
        raise UserError("data.buckets is null: the planner needs the sizes of samples; name them")
    check_bucket_names(data.buckets, data)
    added = [name for name in data.buckets if is_image(name)] if data.images_per_video else []
    drawn = [name for name in data.buckets if name not in added]
    if not drawn:
        raise UserError(f"data.images_per_video={data.images_per_video} and no videos in data.buckets={data.buckets}")
    shares = _shares(config, drawn)
    if data.bucket_micro_batch_sizes == "auto":
        sizes, _ = automatic_sizes(config.model, data.buckets, shares, data)
    else:
        sizes = configured_sizes(data.buckets, data)
    samples = _drawn_samples(config, sizes, shares)
    videos = sum(samples.values())
    samples |= {name: videos * (data.images_per_video or 0) * share for name, share in _shares(config, added).items()}
    return {name: (count, _micro_batch(sizes, name, whole=name in added)) for name, count in samples.items()}


def _shares(config: PretrainConfig, names: list[str]) -> dict[str, float]:
    weights = {name: config.data.bucket_weights.get(name, 0.0) if config.data.bucket_weights else 1.0 for name in names}
    total = sum(weights.values())
    if names and not total:
        raise UserError(f"data.bucket_weights={config.data.bucket_weights} draws nothing from {names}")
    return {name: weight / total for name, weight in weights.items() if weight}


def _drawn_samples(config: PretrainConfig, sizes: BatchSizes, shares: dict[str, float]) -> dict[str, float]:
    """Mean samples of one step: draws are of one bucket each, and fewer where they are larger."""
    draws = config.data.global_batch_size // config.data.samples_per_draw
    mean = 1 / sum(share / sizes.draw[name] for name, share in shares.items())
    return {name: draws * mean * share for name, share in shares.items()}


def _micro_batch(sizes: BatchSizes, name: str, whole: bool) -> int:
    """Samples of the larger of the micro-batches into which a draw is cut; those of single images are full."""
    most = sizes.micro_batch[name]
    if whole:
        return most
    return math.ceil(sizes.draw[name] / math.ceil(sizes.draw[name] / most))
