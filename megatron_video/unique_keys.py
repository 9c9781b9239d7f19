"""Finding a key that occurs twice among any number of them, in constant memory: hashes on disk, sorted in parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.bytes_]
_Words = npt.NDArray[np.uint64]

# Hashes that are sorted at once: 256 MB.
_PART = 1 << 25
_CHUNK = 1 << 22


class KeyCheck:
    """Takes all keys, then says whether one occurs twice.

    Args:
        count: keys that will come.
        folder: where 8 bytes a key may lie meanwhile.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._count = count
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, keys: Keys) -> None:
        """Take keys, [n], of one width."""
        self._file.write(hash_keys(keys).tobytes())

    def duplicate(self, keys_at: Callable[[Integers], Keys]) -> Integers | None:
        """Places of a key that occurs twice, or None.

        Args:
            keys_at: the keys at places, which are compared where hashes are equal.
        """
        self._file.flush()
        parts = -(-self._count // _PART)
        for part in range(parts):
            for value in self._twice(part, parts):
                places = self._places_of(value)
                keys = keys_at(places)
                equal = [np.flatnonzero(keys == key) for key in np.unique(keys)]
                if any(len(found) > 1 for found in equal):
                    return places[max(equal, key=len)]
        return None

    def _twice(self, part: int, parts: int) -> _Words:
        """Hashes that occur more than once among those of one part of the range of values."""
        # By the remainder: as even as the hash is.
        own = [chunk[chunk % np.uint64(parts) == part] for _, chunk in self._chunks()]
        ordered = np.sort(np.concatenate(own))
        return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])

    def _places_of(self, value: np.uint64) -> Integers:
        return np.concatenate([np.flatnonzero(chunk == value) + start for start, chunk in self._chunks()])

    def _chunks(self) -> list[tuple[int, _Words]]:
        hashes = np.memmap(self._file, np.uint64, "r", shape=(self._count,))
        return [(start, hashes[start : start + _CHUNK]) for start in range(0, self._count, _CHUNK)]


def hash_keys(keys: Keys) -> _Words:
    """64 bits of every key, [n]: its words, mixed one after the other with SplitMix64's finalizer (Steele 2014)."""
    width = -(-keys.dtype.itemsize // 8) * 8
    words = np.ascontiguousarray(keys.astype(f"S{width}")).view(np.uint64).reshape(len(keys), -1)
    mixed = np.zeros(len(keys), np.uint64)
    for column in words.T:
        mixed = (mixed ^ column) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
