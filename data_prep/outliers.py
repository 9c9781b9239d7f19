"""Outliers: clips far from the centre of their cluster that are also alone.

With fewer clusters than concepts, clips of a rare concept lie in a cluster of another one, as far from its centre as
what is odd. But they are near to each other, and an odd clip is near to nothing: that tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
import numpy.typing as npt

from data_prep.embeddings import Floats, Numbers, Vectors, blocks_of

# Median absolute deviations of a normal distribution in one standard deviation.
_MAD_TO_SIGMA = 1.4826
# Of fewer clips the spread is not known.
_FEWEST_FOR_SPREAD = 20


def far_clips(
    clusters: Sequence[Numbers], similarity: Floats, deviations: float | None, least: float | None
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Clips too far from the centre of their cluster: below a fixed bound, or far below the others of their cluster.

    Args:
        clusters: the clips of every cluster.
        similarity: float32 [n], cosine of each clip with the centre of its cluster.
        deviations: robust standard deviations below the median of the cluster; None = not looked at.
        least: smallest cosine that is not far; None = not looked at.

    Returns:
        bool [n]; and float32 [n], halfway between a clip's own cosine with the centre and the median of its cluster.
    """
    far, halfway = np.zeros(len(similarity), bool), np.ones(len(similarity), np.float32)
    for members in clusters:
        values = similarity[members]
        middle = np.median(values)
        halfway[members] = (values + middle) / 2
        # Median and not mean: the outliers would widen the bound by which they are found.
        spread = _MAD_TO_SIGMA * np.median(np.abs(values - middle))
        if deviations is not None and len(members) >= _FEWEST_FOR_SPREAD and spread > 0:
            far[members] = values < middle - deviations * spread
        if least is not None:
            far[members] |= values < least
    return far, halfway


def lonely(vectors: Vectors, clips: Numbers, halfway: Floats, neighbours: int) -> npt.NDArray[np.bool_]:
    """Which of some far clips have fewer than `neighbours` others of them as near as `halfway` says, bool [len(clips)].

    Args:
        halfway: float32 [len(clips)], smallest cosine of a neighbour of each.
        neighbours: clips that make a concept; 0 = every far clip counts as alone.
    """
    alone = np.ones(len(clips), bool)
    if not 0 < neighbours < len(clips):
        return alone
    index = faiss.IndexFlatIP(vectors.width)
    for block in blocks_of(clips):
        index.add(vectors.unit(block))
    for numbers in blocks_of(np.arange(len(clips))):
        # Sorted, and the first is the clip itself.
        cosines, _ = index.search(vectors.unit(clips[numbers]), neighbours + 1)
        alone[numbers] = cosines[:, neighbours] < halfway[numbers]
    return alone
