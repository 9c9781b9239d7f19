"""The slowest replica of a step: what jitter, slow nodes and unequal loads add to it, by integral and by simulation.

A step ends when its slowest replica does. Replica i needs its load times a factor with mean 1 that is drawn anew for
every step; a slow node multiplies those of its replicas. With independent nodes the distribution function of the
slowest is the product of theirs, and its mean the integral of what is left to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from training.planner.cluster_life import Jitter

Floats = npt.NDArray[np.float64]

_GRID = 1500
# Standard deviations of a factor beyond which nothing is looked for; exponential tails reach far.
_TAIL = 60.0
_NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class Simulated:
    """A mean over simulated steps."""

    mean: float
    standard_error: float


def loads_on_nodes(loads: Floats, gpus_per_replica: int, gpus_per_node: int) -> Floats:
    """[nodes, replicas of a node] loads; 0 where a node has fewer. A replica of several nodes stands on each."""
    if gpus_per_replica >= gpus_per_node:
        return np.repeat(loads, math.ceil(gpus_per_replica / gpus_per_node))[:, None]
    beside = gpus_per_node // gpus_per_replica
    nodes = math.ceil(len(loads) / beside)
    return np.pad(loads, (0, nodes * beside - len(loads))).reshape(nodes, beside)


def expected_slowest(jitter: Jitter, loads: Floats) -> float:
    """Mean of the slowest replica's time over all steps.

    Args:
        jitter: of the nodes.
        loads: [nodes, replicas of a node] as `loads_on_nodes` gives them, in any unit; 0: no replica.
    """
    nodes, counts = np.unique(np.sort(loads, axis=1), axis=0, return_counts=True)
    points = _points(jitter, loads)
    log_all = np.zeros(len(points))
    for node, count in zip(nodes, counts, strict=True):
        log_all += count * np.log(np.maximum(_node_distribution(jitter, node, points), 1e-300))
    above = 1 - np.exp(log_all)
    widths = np.diff(points)
    # Without jitter it is a step function: exact with the value at the left end of every piece.
    heights = above[:-1] if jitter.spread == 0 else (above[:-1] + above[1:]) / 2
    return float(points[0] + np.sum(widths * heights))


def simulate_slowest(jitter: Jitter, loads: Floats, steps: int, jobs: int, seed: int) -> Simulated:
    """The same mean by drawing factors: slow nodes once a job, jitter once a step.

    Args:
        jitter: of the nodes.
        loads: as above.
        steps: of every job.
        jobs: on nodes drawn anew.
        seed: of all draws.
    """
    random = np.random.default_rng(seed)
    means = []
    for _ in range(jobs):
        slow = np.where(random.random(len(loads)) < jitter.slow_nodes, jitter.slow_factor, 1.0)
        slowest = [float((loads * slow[:, None] * _factors(jitter, random, loads.shape)).max()) for _ in range(steps)]
        means.append(float(np.mean(slowest)))
    return Simulated(float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(jobs)))


def distribution(jitter: Jitter, factors: Floats) -> Floats:
    """Share of the steps in which a replica's factor is at most so large."""
    spread = jitter.spread
    if spread == 0:
        # A little less than 1 is 1: what comes from dividing a load by itself.
        return (factors >= 1 - 1e-12).astype(np.float64)
    if jitter.distribution == "exponential":
        return -np.expm1(-np.maximum(factors - (1 - spread), 0) / spread)
    values = torch.from_numpy(np.maximum(factors, 0))
    if jitter.distribution == "gamma":
        shape = torch.tensor(1 / spread**2, dtype=torch.float64)
        return torch.special.gammainc(shape, values * shape).numpy()
    sigma = _log_sigma(jitter)
    return torch.special.ndtr((torch.log(values) + sigma**2 / 2) / sigma).numpy()


def _factors(jitter: Jitter, random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    spread = jitter.spread
    if spread == 0:
        return np.ones(shape)
    if jitter.distribution == "exponential":
        return 1 - spread + random.exponential(spread, shape)
    if jitter.distribution == "gamma":
        return random.gamma(1 / spread**2, spread**2, shape)
    sigma = _log_sigma(jitter)
    return random.lognormal(-(sigma**2) / 2, sigma, shape)


def _log_sigma(jitter: Jitter) -> float:
    """Of the logarithm, which is normal."""
    return math.sqrt(math.log1p(jitter.spread**2))


def _node_distribution(jitter: Jitter, loads: Floats, points: Floats) -> Floats:
    """Of the slowest replica of one node."""
    values, counts = np.unique(loads[loads > 0], return_counts=True)
    usual, slow = np.ones(len(points)), np.ones(len(points))
    for load, count in zip(values, counts, strict=True):
        usual *= distribution(jitter, points / load) ** count
        slow *= distribution(jitter, points / (load * jitter.slow_factor)) ** count
    return (1 - jitter.slow_nodes) * usual + jitter.slow_nodes * slow


def _points(jitter: Jitter, loads: Floats) -> Floats:
    """Where the distribution function is looked at: from where it is 0 to where it is 1."""
    values = np.unique(loads[loads > 0])
    if jitter.spread == 0:
        return np.unique(np.concatenate([[0.0], values, values * jitter.slow_factor]))
    tail = np.linspace(1, 1 + _TAIL * jitter.spread, _GRID)
    certain = tail[distribution(jitter, tail) >= 1 - _NEGLIGIBLE / loads.size]
    most = certain[0] if len(certain) else tail[-1]
    # The heaviest replica alone is no faster than this but in one step of ten billion.
    below = np.linspace(max(0.0, 1 - _TAIL * jitter.spread), 1, _GRID)
    least = below[distribution(jitter, below) <= _NEGLIGIBLE][-1]
    # Dense where the heaviest replica ends, on a usual node and on a slow one.
    slow = jitter.slow_factor if jitter.slow_nodes else 1.0
    ranges = [(least, most), (slow * least, slow * most), (least, slow * most)]
    return values[-1] * np.unique(np.concatenate([np.linspace(low, high, 2 * _GRID) for low, high in ranges]))
