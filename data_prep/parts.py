"""The parts of a row stage's output that are finished: what survives a kill, and what tasks of an array share.

They lie beside the manifest that is being made, in a folder whose name has the fingerprint of what is made and the
rows per part: settings are never mixed, and every task, also a later one, cuts the work at the same rows.
"""

from __future__ import annotations

import math
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar, overload

import pyarrow as pa

from data_prep.disk import disk_errors
from data_prep.workers import Shard
from megatron_video.manifest import Row, read_manifest, table_from_rows, write_manifest
from megatron_video.run_lock import share_lock

Item = TypeVar("Item")

# Ten million rows must not become forty thousand files.
MAX_PARTS = 4096
# So that the tasks of an array get even shares.
_PARTS_PER_SHARD = 4


class Parts:
    """The parts of one output. Rows of part n stand in the output before those of part n + 1."""

    def __init__(self, manifest_out: Path, fingerprint: str, total: int, part_rows: int, shard: Shard | None) -> None:
        stem = f"{_folder_stem(manifest_out)}-{fingerprint[:12]}"
        size = max(part_rows, math.ceil(total / MAX_PARTS))
        if shard:
            size = max(1, min(size, total // (_PARTS_PER_SHARD * shard.count)))
        # Work that another run left is gone on with, whatever it was cut into.
        begun = sorted(manifest_out.parent.glob(f"{stem}-*"))
        self.folder = begun[0] if begun else manifest_out.with_name(f"{stem}-{size}")
        self.size = int(self.folder.name.rpartition("-")[2])
        self.total = total
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return math.ceil(self.total / self.size)

    def items_of(self, number: int) -> range:
        """Which items make part `number`."""
        return range(number * self.size, min((number + 1) * self.size, self.total))

    def missing(self, shard: Shard | None = None) -> list[int]:
        """Parts that are not there; with a shard, of its share only."""
        mine = (number for number in range(len(self)) if shard is None or number in shard)
        return [number for number in mine if not self._path(number).is_file()]

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Keep a finished part."""
        write_manifest(table_from_rows(rows), self._path(number))

    def read(self, shard: Shard | None = None) -> pa.Table:
        """The rows of all parts in order; with a shard, of its share."""
        numbers = [number for number in range(len(self)) if shard is None or number in shard]
        tables = [read_manifest(self._path(number)) for number in numbers]
        # In one piece: the bytes of the file must not tell what the work was cut into.
        return pa.concat_tables(tables or [table_from_rows([])]).combine_chunks()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"


class Selection(Sequence[Item], Generic[Item]):
    """Ranges of a longer sequence, one after the other; nothing is copied."""

    def __init__(self, items: Sequence[Item], ranges: Sequence[range]) -> None:
        self._items = items
        self._ranges = ranges
        self._ends = list(accumulate(map(len, ranges)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Item]:
        for numbers in self._ranges:
            yield from self._items[numbers.start : numbers.stop]

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        numbers = self._ranges[number]
        return self._items[numbers[index - self._ends[number]]]


class TableRows(Sequence[Row]):
    """Rows of a table, made into Python objects as they are asked for: those take three times the memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        rows: int = self._table.num_rows
        return rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            rows: list[Row] = self._table.slice(start, max(stop - start, 0)).to_pylist()
            return rows
        if not 0 <= index < len(self):
            raise IndexError(index)
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row


def lock_path(manifest_out: Path) -> Path:
    """The lock file of an output; those of its shares have names that begin with it."""
    return manifest_out.with_name(f".{manifest_out.name}.lock")


@contextmanager
def output_lock(manifest_out: Path, shard: Shard | None = None) -> Iterator[None]:
    """Hold an output, or one share of it, which others may hold beside it; what a kill left half written goes.

    Raises:
        LockedError: another run holds it, or, for the whole, a share of it.
        UserError: the folder cannot be written, or the disk is full.
    """
    folder = manifest_out.parent
    share = shard.lock_name if shard else None
    with disk_errors(folder), share_lock(lock_path(manifest_out), manifest_out, share):
        if shard is None:
            for leftover in folder.glob(f".{manifest_out.name}.*.tmp"):
                leftover.unlink()
        yield


def clear_parts(manifest_out: Path, keep: Path | None = None) -> None:
    """Remove the parts of an output, of all settings but those in `keep`; only under the lock of the whole."""
    for folder in manifest_out.parent.glob(f"{_folder_stem(manifest_out)}-*"):
        if folder != keep:
            shutil.rmtree(folder)


def _folder_stem(manifest_out: Path) -> str:
    return f".{manifest_out.name}.parts"
