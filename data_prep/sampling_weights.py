"""How often a clip is drawn, so that large clusters do not drown the small ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_prep.embeddings import Numbers
from megatron_video.errors import UserError


def cluster_weights(counts: Numbers, temperature: float, cap: float) -> npt.NDArray[np.float64]:
    """Weight of each clip of every cluster, float64 [K]; all clips' weights add up to the number of clips.

    A cluster of n clips is drawn in proportion to n^(1/temperature): 1 leaves things as they are, large values draw
    all clusters alike. No weight is above `cap`; what it takes away goes to the clips below it.

    Args:
        counts: int64 [K], clips of every cluster; empty ones get 0.

    Raises:
        UserError: temperature or cap below 1.
    """
    if temperature < 1 or cap < 1:
        raise UserError(f"--temperature {temperature} and --max-weight {cap} must be at least 1")
    filled = np.flatnonzero(counts)
    weights = np.zeros(len(counts))
    # Smallest cluster, that is largest weight, first: the capped ones are then a prefix.
    order = filled[np.argsort(counts[filled], kind="stable")]
    clips = counts[order].astype(np.float64)
    plain = clips ** (1 / temperature - 1)
    total = clips.sum()
    capped_clips = np.concatenate([[0.0], np.cumsum(clips)])
    free_mass = np.concatenate([np.cumsum((clips * plain)[::-1])[::-1], [0.0]])
    for number in range(len(order)):
        scale = (total - cap * capped_clips[number]) / free_mass[number]
        # Mathematically true of the last cluster; rounding must not say otherwise.
        if scale * plain[number] <= cap or number == len(order) - 1:
            weights[order[:number]] = cap
            weights[order[number:]] = scale * plain[number:]
            break
    return weights
