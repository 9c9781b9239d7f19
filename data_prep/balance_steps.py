"""What balance does with the vectors, step by step; every step is a pure function of vectors, settings and seed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.clusters import Assigned, assign, default_clusters, train_centers
from data_prep.embeddings import Floats, Numbers, Vectors
from data_prep.near_duplicates import cosine_keepers, final_keepers, hash_keepers
from data_prep.outliers import far_clips, lonely
from data_prep.sampling_weights import cluster_weights
from data_prep.workers import progress
from megatron_video.errors import UserError
from megatron_video.files import appearing


@dataclass(frozen=True)
class BalanceSettings:
    """What the result depends on, besides vectors and manifest."""

    clusters: int | None = None
    """None = the square root of the number of clips."""
    iterations: int = 20
    seed: int = 0
    duplicate_similarity: float = 0.95
    """Smallest cosine of a near-duplicate inside a cluster; above 1 = not looked for."""
    duplicate_bits: int = 3
    """Largest Hamming distance of perceptual hashes; negative = not looked for."""
    min_center_similarity: float | None = None
    """A clip below is an outlier."""
    outlier_deviations: float | None = 6.0
    """A clip so many robust standard deviations below its cluster's median is an outlier; None = not looked for."""
    outlier_neighbours: int = 5
    """But not one that has so many others like it, which are a rare concept; 0 = also those."""
    temperature: float = 2.0
    """A cluster of n clips is drawn in proportion to n^(1/temperature)."""
    max_weight: float = 4.0
    keep_best: tuple[str, ...] = ("aesthetic", "pixels", "frames")
    """Columns by which the better of two duplicates is known, largest first; -NAME = smallest first."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("clusters", 1 if self.clusters is None else self.clusters, 1),
            ("iterations", self.iterations, 1),
            ("seed", self.seed, 0),
            ("outlier-neighbours", self.outlier_neighbours, 0),
            ("temperature", self.temperature, 1.0),
            ("max-weight", self.max_weight, 1.0),
        ):
            if not value >= least:
                raise UserError(f"--{name} {value} must be at least {least}")
        if not self.duplicate_similarity > 0:
            raise UserError(f"--duplicate-similarity {self.duplicate_similarity} must be above 0")
        if self.outlier_deviations is not None and not self.outlier_deviations > 0:
            raise UserError(f"--outlier-deviations {self.outlier_deviations} must be above 0; 0 = off")
        if self.min_center_similarity is not None and not -1 <= self.min_center_similarity < 1:
            raise UserError(f"--min-center-similarity {self.min_center_similarity} is a cosine: -1 to below 1")


@dataclass(frozen=True)
class Balanced:
    """What was found of n clips; K clusters."""

    cluster: npt.NDArray[np.int32]
    """int32 [n]; -1 = no usable vector, and nothing else is known of the clip."""
    center_similarity: Floats
    """float32 [n]."""
    cluster_count: Numbers
    """int64 [K], before anything is removed."""
    outlier: npt.NDArray[np.bool_]
    """[n]."""
    keeper: Numbers
    """int64 [n]: the better clip of which this one is a near-duplicate; -1 = none."""
    by_hash: npt.NDArray[np.bool_]
    """[n]: the duplicate was found by its hash, not by its vector."""
    nearest: Floats
    """float32 [n]: cosine with the nearest better clip of its cluster that is kept; -1 = none."""
    weight: npt.NDArray[np.float64]
    """float64 [n]; 0 for clips that are not kept."""
    seconds: dict[str, float]
    """How long each step took."""

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """[n]: clips that stay."""
        return (self.cluster >= 0) & ~self.outlier & (self.keeper < 0)


def balance_vectors(
    vectors: Vectors, order: Numbers, hashes: np.ndarray | None, settings: BalanceSettings, work: Path
) -> Balanced:
    """Cluster, drop outliers, drop near-duplicates, weigh.

    Args:
        vectors: of n clips.
        order: int64 [n], all clips, the best first.
        hashes: uint8 [n, bytes] and no hash = all zeros; None = not looked at.
        work: folder where the centres are kept, so that a stopped run does not train again.
    """
    clock = _Clock()
    usable = vectors.usable()
    clock.mark("look at vectors")
    centers = _centers(vectors, usable, settings, work / "centers.npy")
    clock.mark("train centres")
    assigned = assign(vectors, usable, centers)
    cluster = assigned.cluster
    clock.mark("assign")
    outlier = find_outliers(vectors, assigned, settings)
    clock.mark("outliers")
    left = order[(cluster[order] >= 0) & ~outlier[order]]
    keeper, nearest = _by_cosine(vectors, left, assigned, settings.duplicate_similarity)
    clock.mark("duplicates by embedding")
    by_hash = _by_hash(hashes, left, keeper, settings)
    clock.mark("duplicates by hash")
    kept = (cluster >= 0) & ~outlier & (keeper < 0)
    sizes = np.bincount(cluster[kept], minlength=len(centers))
    weights = cluster_weights(sizes, settings.temperature, settings.max_weight)
    return Balanced(
        cluster=cluster,
        center_similarity=assigned.similarity,
        cluster_count=np.bincount(cluster[usable], minlength=len(centers)),
        outlier=outlier,
        keeper=keeper,
        by_hash=by_hash,
        nearest=nearest,
        weight=np.where(kept, weights[cluster], 0.0),
        seconds=clock.seconds,
    )


class _Clock:
    """Seconds since the mark before, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def find_outliers(vectors: Vectors, assigned: Assigned, settings: BalanceSettings) -> npt.NDArray[np.bool_]:
    """Clips too far from their centre, and without enough others like them; bool [n]."""
    known = np.flatnonzero(assigned.cluster >= 0)
    clusters = _members(known, assigned.cluster[known])
    deviations, least = settings.outlier_deviations, settings.min_center_similarity
    outlier, halfway = far_clips(clusters, assigned.similarity, deviations, least)
    far = np.flatnonzero(outlier)
    outlier[far] = lonely(vectors, far, halfway[far], settings.outlier_neighbours)
    return outlier


def _by_cosine(vectors: Vectors, left: Numbers, assigned: Assigned, threshold: float) -> tuple[Numbers, Floats]:
    count = len(assigned.cluster)
    keeper, nearest = np.full(count, -1, np.int64), np.full(count, -1, np.float32)
    if threshold > 1:
        return keeper, nearest
    inside = _members(left, assigned.cluster[left])
    for members in progress(inside, len(inside), "duplicates in clusters", unit="cluster"):
        keeper[members], nearest[members] = cosine_keepers(vectors.unit, members, threshold)
    across = _border_groups(left[keeper[left] < 0], assigned, threshold)
    for group in progress(across, len(across), "duplicates at borders", unit="border"):
        # Who was dropped at another border meanwhile keeps nobody here.
        members = group[keeper[group] < 0]
        keeper[members], similarity = cosine_keepers(vectors.unit, members, threshold)
        nearest[members] = np.maximum(nearest[members], similarity)
    return final_keepers(keeper), nearest


def _border_groups(left: Numbers, assigned: Assigned, threshold: float) -> list[Numbers]:
    """For every cluster, its own and its neighbours' clips that may have a near-duplicate beyond their border."""
    # Two vectors apart by the angle of the threshold can lie on both sides only if each is as near to the border.
    near = left[assigned.to_border[left] <= np.sqrt(max(0.0, 1 - threshold**2))]
    labels = np.concatenate([assigned.cluster[near], assigned.second[near]])
    # Interleaved, so that the best stay first in every group.
    rank = np.argsort(np.tile(np.arange(len(near)), 2), kind="stable")
    return [group for group in _members(np.tile(near, 2)[rank], labels[rank]) if len(group) > 1]


def _by_hash(hashes: np.ndarray | None, left: Numbers, keeper: Numbers, settings: BalanceSettings) -> np.ndarray:
    """Adds to `keeper`, and says where it did."""
    found = np.zeros(len(keeper), bool)
    if hashes is None or settings.duplicate_bits < 0:
        return found
    # The hash of a black picture is all zeros too; it says nothing of what is seen later.
    rows = left[(keeper[left] < 0) & hashes[left].any(axis=1)]
    if len(rows):
        number = hash_keepers(hashes[rows], settings.duplicate_bits)
        found[rows[number >= 0]] = True
        keeper[rows[number >= 0]] = rows[number[number >= 0]]
        # The keeper of an earlier duplicate may be one of these now.
        keeper[:] = final_keepers(keeper)
    return found


def _members(clips: Numbers, labels: npt.NDArray[np.int32]) -> list[Numbers]:
    """The clips of every label that has some, in the given order."""
    # A stable sort keeps the order inside each group.
    order = np.argsort(labels, kind="stable")
    borders = np.flatnonzero(np.diff(labels[order])) + 1
    return [group for group in np.split(clips[order], borders) if len(group)]


def _centers(vectors: Vectors, usable: Numbers, settings: BalanceSettings, kept: Path) -> Floats:
    if kept.is_file():
        centers: Floats = np.load(kept)
        return centers
    if not len(usable):
        raise UserError("no clip of the manifest has a usable embedding: all are zero, not finite or missing")
    clusters = default_clusters(len(usable)) if settings.clusters is None else settings.clusters
    centers = train_centers(vectors, usable, clusters, settings.seed, settings.iterations)
    with appearing(kept) as temporary, open(temporary, "wb") as file:
        np.save(file, centers)
    return centers
