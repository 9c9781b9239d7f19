"""Spherical K-means over more vectors than fit memory: trained on a sample, assigned in blocks (FAISS).

The paper's Cluster_Cnt and Center_Sim come from it (section 8.2 there: over 120,000 clusters for 2 billion clips).
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from data_prep.embeddings import Floats, Numbers, Vectors, blocks_of
from data_prep.workers import progress
from megatron_video.errors import UserError

# FAISS gives its own advice below 39; with fewer, centres follow single clips.
SAMPLE_PER_CLUSTER = 128


def default_clusters(clips: int) -> int:
    """Square root of the number of clips: then clusters are about as large as they are many."""
    return max(1, round(clips**0.5))


def train_centers(vectors: Vectors, usable: Numbers, clusters: int, seed: int, iterations: int) -> Floats:
    """Centres of length 1, float32 [clusters, D]; the same for the same seed, input and number of threads.

    Raises:
        UserError: more clusters than clips.
    """
    if not 1 <= clusters <= len(usable):
        raise UserError(f"--clusters {clusters} must be between 1 and the {len(usable)} clips that have an embedding")
    wanted = min(len(usable), SAMPLE_PER_CLUSTER * clusters)
    chosen = np.random.default_rng(seed).choice(len(usable), wanted, replace=False)
    # In the file's order: a memory-mapped file is read forwards.
    sample = _read(vectors, usable[np.sort(chosen)])
    kmeans = faiss.Kmeans(
        vectors.width,
        clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE_PER_CLUSTER,
    )
    kmeans.train(sample)
    return np.asarray(kmeans.centroids, np.float32).reshape(clusters, vectors.width)


@dataclass(frozen=True)
class Assigned:
    """Where n clips lie among the centres."""

    cluster: npt.NDArray[np.int32]
    """int32 [n]: the nearest centre; -1 = the clip has no usable vector."""
    similarity: Floats
    """float32 [n]: cosine with it."""
    second: npt.NDArray[np.int32]
    """int32 [n]: the next nearest; -1 = there is no other."""
    to_border: Floats
    """float32 [n]: sine of the angle to the border between the two; 2 where there is none."""


def assign(vectors: Vectors, usable: Numbers, centers: Floats) -> Assigned:
    """The two nearest centres of every usable clip."""
    index = faiss.IndexFlatIP(centers.shape[1])
    index.add(centers)
    count = len(vectors.place)
    cluster, second = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    similarity, to_border = np.zeros(count, np.float32), np.full(count, 2, np.float32)
    blocks = list(blocks_of(usable))
    for block in progress(blocks, len(blocks), "assign", unit="block"):
        scores, numbers = index.search(vectors.unit(block), min(2, len(centers)))
        cluster[block], similarity[block] = numbers[:, 0], scores[:, 0]
        if len(centers) > 1:
            second[block] = numbers[:, 1]
            between = np.linalg.norm(centers[numbers[:, 0]] - centers[numbers[:, 1]], axis=1)
            to_border[block] = (scores[:, 0] - scores[:, 1]) / np.maximum(between, 1e-12)
    return Assigned(cluster, similarity, second, to_border)


def _read(vectors: Vectors, clips: Numbers) -> Floats:
    sample = np.empty((len(clips), vectors.width), np.float32)
    start = 0
    for block in blocks_of(clips):
        sample[start : start + len(block)] = vectors.unit(block)
        start += len(block)
    return sample
