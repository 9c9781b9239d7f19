"""Making the mapped index of a folder of shards: two passes over index.parquet, with every check that needs all rows.

Memory does not grow with the number of samples, but for 24 bytes a run of neighbours of one bucket and subset.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_video.buckets import parse_bucket
from megatron_video.errors import UserError
from megatron_video.files import file_sha256
from megatron_video.shard_index import (
    BLOCK,
    MAGIC,
    START,
    IndexClass,
    Integers,
    Section,
    record_dtype,
    section_dtype,
    weight_units,
)
from megatron_video.shard_schema import (
    INDEX_FILE,
    INFO_FILE,
    PAYLOADS,
    check_index_bucket,
    check_index_columns,
    complete_index,
    read_info,
)
from megatron_video.unique_keys import KeyCheck

# Raised when the file's layout or what is in it changes.
FORMAT = 2
SOURCES = (INDEX_FILE, INFO_FILE)
"""Files of the folder that a mapped index is made of."""
_BATCH = 1 << 16
# From here on a build takes long enough to be told of.
_MANY_ROWS = 2_000_000
_TELL_SECONDS = 10
_PAGE = 4096


@dataclass
class _Survey:
    """What the first pass over the index finds: all that the sizes in the file depend on."""

    kinds: int
    rows: int = 0
    key_width: int = 1
    most_tokens: int = 0
    weighted: bool = False
    shards: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, int] = field(default_factory=dict)
    classes: dict[tuple[str, str | None], int] = field(default_factory=dict)
    """(bucket, subset) -> samples."""
    kind_counts: Integers = field(default_factory=lambda: np.zeros(1, np.int64))
    """Samples that have a caption of each kind."""

    def add(self, table: pa.Table, where: Path) -> None:
        self.rows += table.num_rows
        self.key_width = max(self.key_width, pc.max(pc.binary_length(table["key"])).as_py() or 0)
        tokens = token_columns(table, self.kinds)
        self.most_tokens = max(self.most_tokens, int(tokens.max(initial=0)))
        self.kind_counts = self.kind_counts + (tokens[:, 1:] > 0).sum(axis=0)
        self.weighted |= table["weight"].null_count < table.num_rows
        for name in pc.unique(table["shard"]).to_pylist():
            self.shards.setdefault(name, len(self.shards))
        counts = table.select(["bucket", "subset"]).group_by(["bucket", "subset"]).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            self.buckets.setdefault(row["bucket"], len(self.buckets))
            name = row["bucket"], row["subset"]
            self.classes[name] = self.classes.get(name, 0) + row["count_all"]
        for name in pc.unique(table["bucket"]).to_pylist():
            check_index_bucket(where, table.filter(pc.equal(table["bucket"], name)), parse_bucket(name))


class IndexBuilder:
    """Two passes over index.parquet: sizes and checks, then the sections."""

    def __init__(self, folder: Path, target: Path) -> None:
        self._folder, self._target = folder, target
        self._parquet = _open_parquet(folder / INDEX_FILE)
        self._info = read_info(folder)
        self._told = time.monotonic()

    def build(self) -> None:
        """Write the file.

        Raises:
            UserError: the index is damaged, has a key twice or does not fit its buckets.
        """
        survey = _Survey(len(self._info.captions))
        for table in self._batches("looking at"):
            survey.add(table, self._folder / INDEX_FILE)
        sections, end = _layout(survey, 1 + len(self._info.captions))
        with open(self._target, "wb") as file:
            file.truncate(end)
        rows = _Rows(self._target, survey, sections)
        keys = KeyCheck(survey.rows, self._target.parent)
        digest = hashlib.blake2b(digest_size=16)
        for table in self._batches("writing"):
            keys.add(rows.add(table))
            # Keys are hashes of content and clip span, so moving or renaming folders changes nothing.
            digest.update(("\n".join(table["key"].to_pylist()) + "\n").encode())
        _refuse_duplicates(keys, rows.records, survey)
        self._write_tail(survey, sections, rows, digest.hexdigest())

    def _write_tail(self, survey: _Survey, sections: dict[str, Section], rows: _Rows, digest: str) -> None:
        """What is known at the end only: runs, marks, header, and at the very start where the header is."""
        classes, runs, marks = rows.finish()
        with open(self._target, "r+b") as file:
            for name, content in (("runs", runs), ("marks", marks)):
                offset = _whole_pages(file.seek(0, os.SEEK_END))
                file.seek(offset)
                file.write(content.tobytes())
                sections = {**sections, name: Section(content.dtype.str, content.shape, offset)}
            header = json.dumps(self._header(survey, sections, classes, digest)).encode()
            place = file.tell()
            file.write(header)
            file.seek(0)
            file.write(START.pack(MAGIC, place, len(header)))

    def _header(
        self, survey: _Survey, sections: dict[str, Section], classes: list[IndexClass], digest: str
    ) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sources": {name: _identity(self._folder / name) for name in SOURCES},
            "fingerprint": digest,
            "rows": survey.rows,
            "key_width": survey.key_width,
            "buckets": list(survey.buckets),
            "kinds": dict(zip(self._info.captions, survey.kind_counts.tolist(), strict=False)),
            "info": {**asdict(self._info), "shards": [], "files": {}},
            "classes": [asdict(entry) for entry in classes],
            "sections": {name: asdict(section) for name, section in sections.items()},
        }

    def _batches(self, doing: str) -> Iterator[pa.Table]:
        done, count = 0, self._parquet.metadata.num_rows
        # One row group after the other: a reader of all of them keeps in memory what it has read.
        for group in range(self._parquet.num_row_groups):
            for batch in self._parquet.iter_batches(_BATCH, row_groups=[group]):
                yield complete_index(pa.Table.from_batches([batch]))
                done += batch.num_rows
            if count >= _MANY_ROWS and time.monotonic() - self._told > _TELL_SECONDS:
                self._told = time.monotonic()
                print(f"{self._folder}: mapped index, {doing} row {done:,} of {count:,}", file=sys.stderr, flush=True)


class _Rows:
    """Writes the sections that have one entry a sample, batch by batch, and gathers the runs of every class."""

    def __init__(self, target: Path, survey: _Survey, sections: dict[str, Section]) -> None:
        self._survey = survey
        names = sorted(survey.classes, key=lambda name: (name[0], name[1] is not None, name[1] or ""))
        self._classes = {name: number for number, name in enumerate(names)}
        self._class_sizes = np.array([survey.classes[name] for name in names], dtype=np.int64)
        self._class_starts = np.cumsum(self._class_sizes) - self._class_sizes
        self.records, self._tokens, self._weights = (
            _mapped(target, sections[name]) for name in ("records", "tokens", "weights")
        )
        _mapped(target, sections["shards"])[:] = list(survey.shards)
        self._done = 0
        # Samples and summed weight of every class in the batches before.
        self._places, self._sums = np.zeros_like(self._class_sizes), np.zeros_like(self._class_sizes)
        self._last_class = -1
        self._runs: list[Integers] = []

    def add(self, table: pa.Table) -> npt.NDArray[np.bytes_]:
        """Write one batch; its keys."""
        here = slice(self._done, self._done + table.num_rows)
        records = np.empty(table.num_rows, self.records.dtype)
        for name in (*(f"{payload}_{what}" for payload in PAYLOADS for what in ("offset", "size")), "checksum"):
            records[name] = table[name].to_numpy()
        records["key"] = np.array(table["key"].cast(pa.binary()).to_pylist(), dtype=records["key"].dtype)
        records["shard"] = _numbers(table["shard"], self._survey.shards)
        records["bucket"] = _numbers(table["bucket"], self._survey.buckets)
        self.records[here] = records
        self._tokens[here] = token_columns(table, self._tokens.shape[1] - 1)
        classes = _class_numbers(table, self._classes)
        if self._survey.weighted:
            self._add_weights(classes, weight_units(pc.fill_null(table["weight"], 1.0).to_numpy().astype(np.float64)))
        self._add_runs(classes)
        self._done = here.stop
        keys: npt.NDArray[np.bytes_] = records["key"]
        return keys

    def finish(self) -> tuple[list[IndexClass], Integers, Integers]:
        """The classes, and class by class their runs [2, runs] and marks."""
        for section in (self.records, self._tokens, self._weights):
            if isinstance(section, np.memmap):
                section.flush()
        runs = np.concatenate([np.empty((3, 0), np.int64), *self._runs], axis=1)
        runs = runs[:, np.argsort(runs[0], kind="stable")]
        counts = np.bincount(runs[0], minlength=len(self._classes))
        starts = np.cumsum(counts) - counts
        blocks = -(-self._class_sizes // BLOCK)
        marks = np.cumsum(blocks) - blocks
        classes = [
            IndexClass(
                bucket=bucket,
                subset=subset,
                rows=int(self._class_sizes[number]),
                runs=(int(starts[number]), int(counts[number])),
                weights=(int(self._class_starts[number]), int(marks[number])) if self._survey.weighted else None,
            )
            for (bucket, subset), number in self._classes.items()
        ]
        return classes, np.ascontiguousarray(runs[1:]), self._marks()

    def _marks(self) -> Integers:
        """Every BLOCK-th running sum of each class, and its last."""
        found = [np.empty(0, np.int64)]
        for start, size in zip(self._class_starts, self._class_sizes, strict=True):
            if self._survey.weighted:
                last = np.minimum(np.arange(BLOCK, size + BLOCK, BLOCK), size) - 1
                found.append(self._weights[start + last])
        return np.concatenate(found)

    def _add_runs(self, classes: Integers) -> None:
        starts = np.flatnonzero(np.diff(classes, prepend=-1))
        lengths = np.diff(starts, append=len(classes))
        kinds = classes[starts]
        # Place of a run in its class: samples of the class in the batches before, and in this batch before the run.
        order = np.argsort(kinds, kind="stable")
        before = np.cumsum(lengths[order]) - lengths[order]
        firsts = np.searchsorted(kinds[order], kinds[order])
        places = np.empty_like(starts)
        places[order] = before - before[firsts] + self._places[kinds[order]]
        self._places += np.bincount(classes, minlength=len(self._places))
        # A run that goes on from the batch before is there already.
        new = slice(int(kinds[0] == self._last_class), None)
        self._runs.append(np.stack([kinds[new], places[new], starts[new] + self._done]))
        self._last_class = int(kinds[-1])

    def _add_weights(self, classes: Integers, units: Integers) -> None:
        for number in np.unique(classes):
            sums = np.cumsum(units[classes == number]) + self._sums[number]
            start = self._class_starts[number] + self._places[number]
            self._weights[start : start + len(sums)] = sums
            self._sums[number] = sums[-1]


def token_columns(table: pa.Table, kinds: int) -> Integers:
    """Step-LLM tokens, [rows, 1 + kinds]: of the first caption, then of each kind; 0 where a sample has none."""
    tokens = np.zeros((table.num_rows, 1 + kinds), np.int64)
    tokens[:, 0] = table["llm_tokens"].to_numpy()
    for row, values in enumerate(table["caption_tokens"].to_pylist() if kinds else []):
        tokens[row, 1 : 1 + len(values or [])] = values or []
    return tokens


def _layout(survey: _Survey, token_columns_: int) -> tuple[dict[str, Section], int]:
    """The sections whose sizes are known before the rows are, and the end of the last."""
    narrow = survey.most_tokens < 1 << 16
    widest_shard = max((len(name.encode()) for name in survey.shards), default=1)
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "records": (record_dtype(survey.key_width), (survey.rows,)),
        "tokens": (np.dtype("<u2" if narrow else "<u4"), (survey.rows, token_columns_)),
        "shards": (np.dtype(f"S{widest_shard}"), (len(survey.shards),)),
        "weights": (np.dtype("<i8"), (survey.rows if survey.weighted else 0,)),
    }
    sections, end = {}, START.size
    for name, (dtype, shape) in shapes.items():
        start = _whole_pages(end)
        description: Any = dtype.descr if dtype.names else dtype.str
        sections[name] = Section(description, shape, start)
        end = start + dtype.itemsize * int(np.prod(shape))
    return sections, end


def _whole_pages(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE


def _mapped(path: Path, section: Section) -> npt.NDArray[Any]:
    dtype = section_dtype(section)
    # Nothing cannot be mapped.
    if 0 in section.shape:
        return np.empty(section.shape, dtype)
    return np.memmap(path, dtype, "r+", section.offset, section.shape)


def _numbers(column: pa.ChunkedArray, numbers: dict[str, int]) -> Integers:
    """The number of each value of a column."""
    encoded = column.combine_chunks().dictionary_encode()
    table = np.array([numbers[name] for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    return table[encoded.indices.to_numpy()]


def _class_numbers(table: pa.Table, classes: dict[tuple[str, str | None], int]) -> Integers:
    buckets, subsets = (table[name].combine_chunks().dictionary_encode() for name in ("bucket", "subset"))
    inside = pc.fill_null(subsets.indices, len(subsets.dictionary)).to_numpy()
    names = [*subsets.dictionary.to_pylist(), None]
    # Pairs that do not occur have no number.
    pairs = [[classes.get((bucket, subset), -1) for subset in names] for bucket in buckets.dictionary.to_pylist()]
    return np.array(pairs, dtype=np.int64)[buckets.indices.to_numpy(), inside]


def _refuse_duplicates(keys: KeyCheck, records: npt.NDArray[np.void], survey: _Survey) -> None:
    rows = keys.duplicate(lambda wanted: records["key"][wanted])
    if rows is not None:
        names = list(survey.shards)
        shards = ", ".join(names[records["shard"][row]] for row in rows)
        key = records["key"][rows[0]].decode()
        raise UserError(f"key {key} occurs in {shards}; keys must be unique over the data set")


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        opened = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    check_index_columns(path, opened.schema_arrow.names)
    return opened


def _identity(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
