"""Vectors with clusters, near-duplicates and outliers that are known because they were put there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 65536


@dataclass(frozen=True)
class Planted:
    """What is where; clip n stands in row n."""

    label: np.ndarray
    """int32 [n]: the cluster that a clip was drawn from; -1 = outlier."""
    copy_of: np.ndarray
    """int64 [n]: the clip that this one is a copy of with a little noise; -1 = none."""


def plant(
    path: Path,
    clips: int,
    width: int,
    clusters: int,
    seed: int = 0,
    copies: float = 0.05,
    outliers: float = 0.002,
    spread: float = 0.6,
    copy_noise: float = 0.15,
) -> Planted:
    """Write float32 [clips, width] to a .npy file, in blocks.

    Sizes of clusters fall as one over their rank. A vector is a random unit centre plus noise of length `spread`, so
    that two of a cluster have a cosine of about 1 / (1 + spread^2); a copy is another vector plus noise of length
    `copy_noise`; an outlier is noise only.
    """
    rng = np.random.default_rng(seed)
    centers = _unit(_normal(rng, clusters, width))
    share = 1 / np.arange(1, clusters + 1)
    label = rng.choice(clusters, clips, p=share / share.sum()).astype(np.int32)
    kind = rng.random(clips)
    label[kind < outliers] = -1
    size = min(BLOCK, clips)
    # Originals in the first half of a block, copies in the second: both are at hand when a copy is made.
    late = np.arange(clips) % size >= size // 2
    is_copy = (kind >= outliers) & (kind < outliers + 2 * copies) & late
    original = np.flatnonzero((kind >= outliers) & ~late)
    copy_of = np.full(clips, -1, np.int64)
    data = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(clips, width))
    for start in range(0, clips, size):
        rows = np.arange(start, min(start + size, clips))
        block = centers[label[rows]] + spread * _unit(_normal(rng, len(rows), width))
        block[label[rows] < 0] = _unit(_normal(rng, int((label[rows] < 0).sum()), width))
        here = original[(original >= start) & (original < start + size)]
        copy = rows[is_copy[rows]]
        if len(here) and len(copy):
            copy_of[copy] = rng.choice(here, len(copy))
            noise = copy_noise * _unit(_normal(rng, len(copy), width))
            block[copy - start] = _unit(block[copy_of[copy] - start]) + noise
            label[copy] = label[copy_of[copy]]
        data[start : start + len(rows)] = _unit(block)
    data.flush()
    return Planted(label, copy_of)


def purity(found: np.ndarray, label: np.ndarray) -> float:
    """Share of clips whose found cluster has their own label as its most frequent one; outliers left out."""
    real = label >= 0
    pairs, count = np.unique(np.stack([found[real], label[real]]), axis=1, return_counts=True)
    largest = np.zeros(pairs[0].max() + 1, np.int64)
    np.maximum.at(largest, pairs[0], count)
    return float(largest.sum() / real.sum())


def _normal(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    return rng.standard_normal((rows, width), dtype=np.float32)


def _unit(block: np.ndarray) -> np.ndarray:
    result: np.ndarray = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float32)
    return result
