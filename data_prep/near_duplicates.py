"""Near-duplicates: greedy, best clip first, so that within one search a keeper is never a duplicate itself.

A clip is a duplicate if a better clip that is kept is near enough: by the cosine of their vectors among some clips (a
cluster, as in SemDeDup, arXiv 2303.09540), or by the Hamming distance of their perceptual hashes.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from data_prep.embeddings import Floats, Numbers

# Rows and columns of one block of cosines: 1024 x 8192 floats are 32 MiB.
_BLOCK = 1024
_KEPT_BLOCK = 8192
_QUERIES = 65536


def cosine_keepers(load: Callable[[Numbers], Floats], members: Numbers, threshold: float) -> tuple[Numbers, Floats]:
    """Keeper of each member of one cluster, or -1 where it is kept itself; and the cosine with the nearest kept one.

    Args:
        load: unit vectors float32 [n, D] of some clips.
        members: clips of the cluster, the best first.
        threshold: smallest cosine of a duplicate.

    Returns:
        int64 [n], a clip or -1, and float32 [n] (-1 for the best clip, which has no better one).
    """
    keeper, nearest = np.full(len(members), -1, np.int64), np.full(len(members), -1, np.float32)
    kept = np.zeros(0, np.int64)
    for start in range(0, len(members), _BLOCK):
        clips = members[start : start + _BLOCK]
        vectors = load(clips)
        similarity, match = _nearest_kept(load, vectors, kept)
        within = vectors @ vectors.T
        # Only better clips count, and those come first.
        within[np.triu_indices(len(clips))] = -1
        is_kept = _decide(within, similarity >= threshold, threshold)
        within[:, ~is_kept] = -1
        closer = within.max(axis=1) > similarity
        match[closer] = clips[within.argmax(axis=1)[closer]]
        similarity = np.maximum(similarity, within.max(axis=1))
        keeper[start : start + len(clips)] = np.where(is_kept, -1, match)
        nearest[start : start + len(clips)] = similarity
        kept = np.concatenate([kept, clips[is_kept]])
    return keeper, nearest


def hash_keepers(hashes: np.ndarray, radius: int) -> Numbers:
    """Keeper (as a row) of every hash, or -1 where it is kept itself.

    Args:
        hashes: uint8 [n, bytes], the best clip first.
        radius: largest Hamming distance of a duplicate, in bits.
    """
    # Equal hashes first, without a search: a million black clips would be 10^12 pairs.
    _, first, group = np.unique(_keys(hashes), return_index=True, return_inverse=True)
    keeper = np.where(first[group] == np.arange(len(hashes)), -1, first[group])
    rows = np.sort(first)
    found = _near_hashes(np.ascontiguousarray(hashes[rows]), radius) if radius and len(rows) > 1 else {}
    for number in sorted(found):
        # Its own keeper may have been found before: then it keeps nobody.
        if keeper[rows[number]] < 0:
            near = rows[found[number]]
            keeper[near[keeper[near] < 0]] = rows[number]
    return final_keepers(keeper)


def final_keepers(keeper: Numbers) -> Numbers:
    """Follow keepers that have a keeper of their own to the last one."""
    while True:
        step = np.where(keeper < 0, -1, keeper[keeper])
        if (step < 0).all():
            return keeper
        keeper = np.where(step < 0, keeper, step)


def _keys(hashes: np.ndarray) -> np.ndarray:
    """One value a hash; 64 bits as a number, which sorts ten times faster than bytes."""
    size = hashes.shape[1]
    return np.ascontiguousarray(hashes).view(np.uint64 if size == 8 else f"V{size}").ravel()


def _nearest_kept(load: Callable[[Numbers], Floats], vectors: Floats, kept: Numbers) -> tuple[Floats, Numbers]:
    best, match = np.full(len(vectors), -1, np.float32), np.full(len(vectors), -1, np.int64)
    for start in range(0, len(kept), _KEPT_BLOCK):
        block = kept[start : start + _KEPT_BLOCK]
        cosines = vectors @ load(block).T
        column = cosines.argmax(axis=1)
        value = cosines[np.arange(len(vectors)), column]
        match = np.where(value > best, block[column], match)
        best = np.maximum(best, value)
    return best, match


def _decide(within: Floats, dropped: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows of a block are kept; `within` is the strict lower triangle of its cosines."""
    kept = ~dropped
    close = within >= threshold
    # In order, as whether a clip is kept depends on the better ones; most have no near one at all.
    for row in np.flatnonzero(close.any(axis=1) & kept):
        kept[row] = not (close[row] & kept).any()
    return kept


def _near_hashes(values: np.ndarray, radius: int) -> dict[int, np.ndarray]:
    """Row -> worse rows within the radius; rows without any are left out. Exact, not approximate."""
    bits = values.shape[1] * 8
    index = _hash_index(bits, radius)
    index.add(values)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(values), _QUERIES):
        # FAISS searches below its radius, not up to it.
        limits, _, rows = index.range_search(values[start : start + _QUERIES], radius + 1)
        for number in np.flatnonzero(np.diff(limits) > 1):
            near = rows[limits[number] : limits[number + 1]]
            worse = near[near > start + number]
            if len(worse):
                found[start + int(number)] = worse
    return found


def _hash_index(bits: int, radius: int) -> faiss.IndexBinary:
    # Cut into p pieces, two hashes within r bits share one piece up to r // p bits: so many flips find it for sure.
    pieces, flips = max(1, -(-(radius + 1) // 2)), 1
    if pieces * 16 > bits:
        # Too short for that: compare with all.
        return faiss.IndexBinaryFlat(bits)
    index = faiss.IndexBinaryMultiHash(bits, pieces, min(bits // pieces, 24))
    index.nflip = flips
    return index
