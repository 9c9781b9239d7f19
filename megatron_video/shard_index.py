"""The mapped index: index.parquet in a form that is mapped into memory and read by position, whatever its size.

Every process of a host shares the mapped pages, and opening costs the same for ten samples and for a billion. It is
derived: shard_index_build.py makes it of index.parquet, which stays the truth, and makes it anew when that changes.

One file: magic, place and length of the header, then sections that begin at whole pages, then the header (JSON):
    records  one a sample: key, shard, bucket, places and sizes of its payloads, checksum
    tokens   [samples, 1 + kinds]: Step-LLM tokens of the first caption, and of the caption of every kind (0: has none)
    shards   file names
    weights  class by class the running sum of the samples' weights; empty where all weigh 1
    marks    of every class the running sum at the end of each BLOCK of samples, by which the block is found
    runs     [2, runs]: for every class (one bucket, one subset) its runs of neighbouring samples, as first place in
             the class and first sample
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_video.errors import UserError
from megatron_video.shard_schema import PAYLOADS, DatasetInfo

MAP_FILE = "index.map"
MAGIC = b"MVINDEX1"
START = struct.Struct("<8sqq")
"""Magic, offset and length of the header."""
BLOCK = 512
"""Running sums that are read at once: one page."""
WEIGHT_UNIT = 1 << 16
"""Weights are whole multiples of 1 / WEIGHT_UNIT, so that sums of a billion of them are exact."""

Integers = npt.NDArray[np.int64]


class IndexRow(NamedTuple):
    """Where one sample lies."""

    key: str
    shard: str
    bucket: str
    places: dict[str, tuple[int, int]]
    """(offset, size) in the tar of every payload."""
    checksum: int


@dataclass(frozen=True)
class Section:
    """An array in the file."""

    dtype: Any
    """As numpy's array interface writes it: "<i8", or pairs of name and type."""
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class IndexClass:
    """Samples of one bucket and one subset, in the order of the index."""

    bucket: str
    subset: str | None
    rows: int
    runs: tuple[int, int]
    """First run and number of runs, in the section of runs."""
    weights: tuple[int, int] | None
    """Its first running sum in the section of weights, and its first mark; None: every sample weighs 1."""


def record_dtype(key_width: int) -> np.dtype[np.void]:
    """One sample's record, packed; `record_struct` reads the same bytes."""
    fields = [("key", f"S{key_width}"), ("shard", "<i4"), ("bucket", "<u2"), ("checksum", "<u4")]
    fields += [(f"{payload}_offset", "<i8") for payload in PAYLOADS]
    return np.dtype(fields + [(f"{payload}_size", "<u4") for payload in PAYLOADS])


def record_struct(key_width: int) -> struct.Struct:
    """Unpacks one record twenty times faster than numpy does."""
    count = len(PAYLOADS)
    return struct.Struct(f"<{key_width}siHI{count}q{count}I")


def section_dtype(section: Section) -> np.dtype[Any]:
    """numpy's type of a section's elements."""
    # JSON made lists of the pairs.
    described = section.dtype if isinstance(section.dtype, str) else [tuple(pair) for pair in section.dtype]
    return np.dtype(described)


def weight_units(weights: npt.NDArray[np.float64]) -> Integers:
    """Weights, [n], as whole numbers of 1 / WEIGHT_UNIT; one that is not 0 stays above 0."""
    units = np.rint(weights * WEIGHT_UNIT).astype(np.int64)
    return np.where(weights > 0, np.maximum(units, 1), 0)


class ClassRows:
    """The samples of one class by their place in it; little is mapped, and nothing is kept of what is read."""

    def __init__(self, index: MappedIndex, entry: IndexClass) -> None:
        self._index, self._entry = index, entry
        self._first_places, self._first_rows = index.section("runs")[:, entry.runs[0] : sum(entry.runs)]
        self._marks: Integers | None = None
        if entry.weights is not None:
            self._marks = index.section("marks")[entry.weights[1] : entry.weights[1] + -(-entry.rows // BLOCK)]

    def __len__(self) -> int:
        """Number of samples."""
        return self._entry.rows

    def __getitem__(self, places: Integers) -> Integers:
        """Rows of the index, [n], at `places`, [n]."""
        runs = np.searchsorted(self._first_places, places, side="right") - 1
        return self._first_rows[runs] + (places - self._first_places[runs])

    @property
    def total_weight(self) -> int | None:
        """Sum of the weights in units of 1 / WEIGHT_UNIT; None where every sample weighs 1."""
        return None if self._marks is None else int(self._marks[-1])

    def locate(self, units: Integers) -> Integers:
        """Places whose share of the running sum of weights holds `units`."""
        if self._marks is None or self._entry.weights is None:
            return units // WEIGHT_UNIT
        first = self._entry.weights[0]
        places, blocks = np.empty(len(units), np.int64), np.searchsorted(self._marks, units, side="right")
        for number, (unit, block) in enumerate(zip(units.tolist(), blocks.tolist(), strict=True)):
            count = min(BLOCK, self._entry.rows - block * BLOCK)
            sums = self._index.weight_sums(first + block * BLOCK, count)
            places[number] = block * BLOCK + sums.searchsorted(unit, side="right")
        return places


class MappedIndex:
    """An open mapped index. Safe after a fork; a copy in another process maps the file again.

    Args:
        path: the file.

    Raises:
        UserError: not a mapped index, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self.header = self._read_header()
        self.info = DatasetInfo(**self.header["info"])
        """Without the lists of shards and files, which grow with the data set."""
        self.rows: int = self.header["rows"]
        self.fingerprint: str = self.header["fingerprint"]
        """Digest of all keys in order."""
        self.classes = [
            IndexClass(v["bucket"], v["subset"], v["rows"], tuple(v["runs"]), v["weights"] and tuple(v["weights"]))
            for v in self.header["classes"]
        ]
        self._sections = {
            name: Section(values["dtype"], tuple(values["shape"]), values["offset"])
            for name, values in self.header["sections"].items()
        }
        # The widths of a record, once: reading one must cost microseconds.
        self._record = record_struct(self.header["key_width"])
        self._records_at = self._sections["records"].offset
        self._bucket_names: list[str] = self.header["buckets"]
        tokens = self._sections["tokens"]
        self._tokens = tokens.dtype, np.dtype(tokens.dtype).itemsize * tokens.shape[1], tokens.offset

    def __len__(self) -> int:
        """Number of samples."""
        return self.rows

    def row(self, number: int) -> IndexRow:
        """Where sample `number` lies."""
        content = os.pread(self._file, self._record.size, self._records_at + number * self._record.size)
        key, shard, bucket, checksum, *places = self._record.unpack(content)
        offsets, sizes = places[: len(PAYLOADS)], places[len(PAYLOADS) :]
        spans = dict(zip(PAYLOADS, zip(offsets, sizes, strict=True), strict=True))
        return IndexRow(
            key.rstrip(b"\0").decode(), self._shards[shard].decode(), self._bucket_names[bucket], spans, checksum
        )

    def tokens(self, rows: Integers) -> Integers:
        """Step-LLM tokens, [n, 1 + kinds], of the first caption and of the caption of every kind of samples, [n]."""
        dtype, size, start = self._tokens
        content = b"".join([os.pread(self._file, size, start + row * size) for row in rows.tolist()])
        return np.frombuffer(content, dtype).reshape(len(rows), -1).astype(np.int64)

    def weight_sums(self, first: int, count: int) -> Integers:
        """`count` running sums from place `first` of their section on."""
        # Read and not mapped: what is touched here and there would add up in every process's memory.
        return np.frombuffer(os.pread(self._file, 8 * count, self._sections["weights"].offset + 8 * first), "<i8")

    def select(self, bucket: str, subsets: Collection[str] | None = None) -> list[ClassRows]:
        """The classes of a bucket, of all subsets or of those named."""
        wanted = (entry for entry in self.classes if entry.bucket == bucket)
        return [ClassRows(self, entry) for entry in wanted if subsets is None or entry.subset in subsets]

    def section(self, name: str) -> npt.NDArray[Any]:
        """A section, mapped."""
        section = self._sections[name]
        # Nothing cannot be mapped.
        if 0 in section.shape:
            return np.empty(section.shape, section_dtype(section))
        return np.memmap(self.path, section_dtype(section), "r", section.offset, section.shape)

    @cached_property
    def _shards(self) -> npt.NDArray[np.bytes_]:
        return self.section("shards")

    def _read_header(self) -> dict[str, Any]:
        start = os.pread(self._file, START.size, 0)
        if len(start) < START.size or not start.startswith(MAGIC):
            raise UserError(f"{self.path} is no mapped index of this version; delete it, it is made again")
        _, offset, length = START.unpack(start)
        try:
            # Behind all sections: it is whole only if they are.
            header: dict[str, Any] = json.loads(os.pread(self._file, length, offset))
        except ValueError:
            raise UserError(f"{self.path} ends early; delete it, it is made again") from None
        return header

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors and mappings mean nothing in another process.
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
