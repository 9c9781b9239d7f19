"""How often each group of samples (one source, one bucket) is drawn: by the weights of sources, buckets, samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from megatron_video.buckets import parse_bucket
from megatron_video.errors import UserError
from training.sample_groups import WEIGHT_UNIT, GroupKey, SampleGroup

# Fitting both margins of a table converges in a few dozen rounds where it is possible at all.
_FITTING_ROUNDS = 2000
_CLOSE_ENOUGH = 1e-9


@functools.cache  # asked for every micro-batch, of a few names
def is_image(bucket: str) -> bool:
    """Whether samples of the bucket are single frames."""
    return parse_bucket(bucket).frames == 1


def group_size(group: SampleGroup) -> float:
    """Draws of an epoch: the number of samples, or the sum of their weights."""
    total = group.total_weight
    return float(len(group)) if total is None else total / WEIGHT_UNIT


def group_shares(
    groups: Mapping[GroupKey, SampleGroup],
    source_weights: Mapping[str, float] | None,
    bucket_weights: Mapping[str, float],
) -> dict[GroupKey, float]:
    """Fraction of the drawn samples that each group gives; the fractions sum to 1.

    Without weights every sample is drawn equally often (or as often as its own weight says). Sources give the shares
    that their weights say, and so do buckets; where both have weights, the table of groups is fitted to both
    (iterative proportional fitting, Deming and Stephan 1940), which keeps what the sizes say of the rest.

    Raises:
        UserError: the weights leave nothing, or no mix has both shares.
    """
    shares = {key: group_size(group) for key, group in sorted(groups.items())}
    for axis, weights in enumerate((source_weights, bucket_weights)):
        shares = {key: size for key, size in shares.items() if not weights or weights[key[axis]] > 0}
    if not any(shares.values()):
        raise UserError(
            "the weights of sources, buckets and samples leave nothing to draw; groups (source, bucket) with samples: "
            f"{sorted(groups)}"
        )
    for _ in range(_FITTING_ROUNDS):
        before = shares
        shares = _scaled(_scaled(shares, 0, source_weights), 1, bucket_weights)
        if max(abs(shares[key] - before[key]) for key in shares) < _CLOSE_ENOUGH:
            break
    _check_margin(shares, source_weights)
    total = math.fsum(shares.values())
    return {key: share / total for key, share in shares.items()}


def bucket_shares(shares: Mapping[GroupKey, float]) -> dict[str, float]:
    """Sum over sources, by bucket in order of name."""
    return {name: math.fsum(shares[key] for key in shares if key[1] == name) for name in sorted({b for _, b in shares})}


def of_kind(groups: Mapping[GroupKey, SampleGroup], images: bool) -> dict[GroupKey, SampleGroup]:
    """Only the groups of images, or only those of videos."""
    return {key: group for key, group in groups.items() if is_image(key[1]) == images}


def _scaled(shares: Mapping[GroupKey, float], axis: int, weights: Mapping[str, float] | None) -> dict[GroupKey, float]:
    """The table with the margin of one axis brought to its weights, among the names that are there; sums to 1."""
    names = sorted({key[axis] for key in shares})
    # fsum: the same on every machine, whatever the order.
    sums = {name: math.fsum(share for key, share in shares.items() if key[axis] == name) for name in names}
    wanted = {name: weights[name] for name in names} if weights else sums
    total = math.fsum(wanted.values())
    return {
        key: share / sums[key[axis]] * wanted[key[axis]] / total if sums[key[axis]] else 0.0
        for key, share in shares.items()
    }


def _check_margin(shares: Mapping[GroupKey, float], source_weights: Mapping[str, float] | None) -> None:
    """The last scaling was that of buckets: whether the sources' shares hold too."""
    if not source_weights:
        return
    fitted = _scaled(shares, 0, source_weights)
    if max(abs(fitted[key] - share) for key, share in shares.items()) > 1e-3:
        holds = {source: sorted(b for s, b in shares if s == source) for source in sorted({s for s, _ in shares})}
        raise UserError(
            f"data.bucket_weights and the weights of the sources {dict(source_weights)} cannot both hold, with sources "
            f"that have these buckets: {holds}; leave one of the two out"
        )
