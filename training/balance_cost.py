"""What samples cost, by the cost model or as measured, and the micro-batch sizes that make buckets cost alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from megatron_video.errors import UserError

# A replica that is 10 % slower than the mean costs 10 % of the step; that a step has 10 % more samples than asked for
# counts like 1.5 %.
_MEAN_WEIGHT = 0.15

# A step of 100,000 of them on 1,000 replicas is far below 2^53.
_UNITS = 10_000_000


@dataclass(frozen=True)
class Costs:
    """Cost of forward and backward: a straight line over the samples of a micro-batch, for every bucket."""

    unit: Literal["FLOP", "s"]
    """Floating-point operations, or measured seconds."""
    sample: Mapping[str, float]
    """By bucket, of one more sample in a micro-batch."""
    micro_batch: Mapping[str, float]
    """By bucket, of one more micro-batch, however small."""

    @staticmethod
    def of_flops(sample: Mapping[str, float]) -> Costs:
        """Costs in FLOPs: in them a micro-batch is no more than its samples."""
        return Costs("FLOP", sample, dict.fromkeys(sample, 0.0))

    def in_units(self) -> Costs:
        """The same in whole units of a ten-millionth of the largest, which sums hold exactly in any order.

        Every replica shares the step out for itself: processors that round the last digit otherwise must not come to
        another result.
        """
        unit = max(*self.sample.values(), *self.micro_batch.values()) / _UNITS
        sample = {name: float(max(1, round(cost / unit))) for name, cost in self.sample.items()}
        return Costs(self.unit, sample, {name: float(round(cost / unit)) for name, cost in self.micro_batch.items()})

    def of(self, bucket: str, samples: int, micro_batches: int = 1) -> float:
        """Cost of `samples` of one bucket in `micro_batches` micro-batches."""
        return self.sample[bucket] * samples + self.micro_batch[bucket] * micro_batches


def read_profile(path: str | Path, buckets: list[str]) -> Costs:
    """Costs from a file of measured seconds (YAML or JSON).

    It maps a bucket to the seconds of one sample, or to {samples of a micro-batch: seconds of the micro-batch}, through
    which a straight line is laid:

        68x192x320: 0.41
        1x192x320: {8: 0.09, 16: 0.14, 32: 0.26}

    Raises:
        UserError: no such file, not of this form, or a bucket in use is missing.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"data.cost_profile={path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"data.cost_profile={path}: must map buckets to seconds, such as '68x192x320: 0.41'")
    missing = [name for name in buckets if name not in values]
    if missing:
        raise UserError(f"data.cost_profile={path} has no seconds for {missing}; measure all of {buckets}")
    lines = {name: _line(path, name, values[name]) for name in buckets}
    return Costs("s", {n: line[0] for n, line in lines.items()}, {n: line[1] for n, line in lines.items()})


def coarse_sizes(
    flops: Mapping[str, float], shares: Mapping[str, float], mean_size: int
) -> tuple[dict[str, int], float]:
    """Samples of a draw from every bucket: B_r = floor(F_target / (alpha * F_r)), at least 1.

    Equation 12 of arXiv 2502.10248. F_target is the cost of `mean_size` of the most expensive samples. The paper's
    alpha "keeps the global batch consistent" and is not given. Sizes are whole numbers, so that draws which cost alike
    may not have `mean_size` samples on average: alpha is the best of both, with more weight on equal cost.

    Args:
        flops: of one sample of every bucket.
        shares: of the drawn samples by bucket; the others are never drawn.
        mean_size: samples of a draw, on average.

    Returns:
        The sizes, and alpha.
    """
    total = math.fsum(shares.values())
    drawn = {name: share / total for name, share in shares.items() if share > 0}
    target = mean_size * max(flops[name] for name in drawn)
    mean_flops = math.fsum(share * flops[name] for name, share in drawn.items())

    def size_of(name: str, limit: float) -> int:
        # A hair more: a limit that was computed as n * F_r must give n.
        return max(1, math.floor(limit / flops[name] * (1 + 1e-12)))

    def misfit(limit: float) -> float:
        sizes = {name: size_of(name, limit) for name in drawn}
        mean = 1 / math.fsum(share / sizes[name] for name, share in drawn.items())
        spread = max(sizes[name] * flops[name] for name in drawn) / (mean * mean_flops)
        return math.log(spread) + _MEAN_WEIGHT * abs(math.log(mean / mean_size))

    # Between these limits no size changes.
    limits = {n * flops[name] for name in drawn for n in range(1, math.floor(target / flops[name]) + 1)}
    limit = min(sorted(limits | {target}), key=misfit)
    return {name: size_of(name, limit) for name in flops}, target / limit


def _line(path: str | Path, bucket: str, value: Any) -> tuple[float, float]:
    """(seconds of a sample, seconds of a micro-batch)."""
    try:
        # Keys of JSON are strings.
        points = {float(n): float(seconds) for n, seconds in (value if isinstance(value, dict) else {1: value}).items()}
    except (TypeError, ValueError):
        points = {}
    if not points or not all(0 < number < math.inf for number in (*points, *points.values())):
        raise UserError(
            f"data.cost_profile={path}: {bucket}: {value} must be seconds of a sample above 0, or a mapping of the "
            "samples of a micro-batch to its seconds, such as {8: 0.09, 16: 0.14}"
        )
    if len(points) == 1:
        ((samples, seconds),) = points.items()
        return seconds / samples, 0.0
    slope, start = np.polyfit(list(points), list(points.values()), 1)
    # Noise may tilt the line below 0; then the mean cost of a sample is the better guess.
    if slope <= 0 or start < 0:
        return float(np.mean([seconds / samples for samples, seconds in points.items()])), 0.0
    return float(slope), float(start)
