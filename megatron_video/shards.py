"""Shards: webdataset tars of encoded samples, with an index that finds every sample by number.

A sample of key K is three members of one tar:
    K.latent.safetensors  moments [t, 2z, h, w] bf16: mean and log-variance of the Video-VAE's posterior
    K.text.safetensors    llm [n, d_llm] bf16 (true length n), clip [L_clip, d_clip] bf16 (all slots)
    K.json                caption, bucket, where the clip comes from
Beside the tars lie index.parquet, null_text.safetensors (the states of the empty caption) and dataset_info.json, which
is written last: a folder without it is unfinished. shard_schema.py has the names, columns and checks.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.errors import UserError
from megatron_video.files import appearing, publish
from megatron_video.shard_index import IndexRow
from megatron_video.shard_index_open import build_index, open_index
from megatron_video.shard_schema import (
    INDEX_FILE,
    INDEX_SCHEMA,
    INFO_FILE,
    MEMBER_SUFFIXES,
    NULL_TEXT_FILE,
    PAIRS_SCHEMA_VERSION,
    PARTS_FOLDER,
    PAYLOADS,
    SHARD_SCHEMA_VERSION,
    DamagedSampleError,
    DatasetInfo,
    ShardSample,
    caption_tokens,
    check_fits,
    check_index_columns,
    complete_index,
    crc32,
    decode_sample,
    encode_sample,
    file_sha256,
    index_part,
    read_info,
    read_null_text,
    write_atomically,
)
from megatron_video.shard_schema import write_null_text as write_null_text
from megatron_video.shard_tar import CHECKSUM, ShardTar, is_intact

_OPEN_SHARDS = 64
_ROW_GROUP = 1 << 18
_PIECE = 1 << 18
# Seconds before a sample is read again; four times as many before each further time.
_FIRST_PAUSE = 0.2


class ShardWriter:
    """Writes one shard. The tar and its index appear together when the `with` block ends well, else nothing does.

    The same samples give the same bytes.
    """

    def __init__(self, folder: str | Path, name: str, captions: Sequence[str] = ()) -> None:
        """Begin a shard.

        Args:
            folder: of the data set.
            name: of the tar.
            captions: kinds of captions that samples may have, as DatasetInfo.captions names them.
        """
        self.folder, self.name, self._captions = Path(folder), name, captions
        (self.folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        self._tar = ShardTar(self._temporary)
        self._rows: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # A shard without samples is not written.
            checksum = self._end_tar(kind is None and bool(self._rows))
            if checksum is not None:
                self._publish(checksum)
        finally:
            self._temporary.unlink(missing_ok=True)

    def add(
        self, sample: ShardSample, bucket: Bucket, *, subset: str | None = None, weight: float | None = None
    ) -> None:
        """Append a sample.

        Raises:
            UserError: the latent does not fit the bucket, the key is taken or has a dot, or the text has a wrong shape.
        """
        self._check(sample, bucket)
        further = {"caption_tokens": caption_tokens(sample, self._captions), "subset": subset, "weight": weight}
        self.add_encoded(sample.key, encode_sample(sample), bucket, len(sample.llm), further)

    def add_encoded(
        self,
        key: str,
        payloads: Mapping[str, bytes],
        bucket: Bucket,
        llm_tokens: int,
        further: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Append a sample by its three payloads, as `encode_sample` made them or `ShardDataset.payloads` read them.

        Args:
            further: other columns of its row: caption_tokens, subset, weight.

        Raises:
            UserError: the key is taken or has a dot.
        """
        self._check_key(key)
        offsets = {
            payload: self._tar.append(f"{key}.{MEMBER_SUFFIXES[payload]}", content)
            for payload, content in payloads.items()
        }
        row: dict[str, Any] = {"key": key, "shard": self.name, "bucket": bucket.name, **bucket._asdict()}
        row |= {f"latent_{name}": size for name, size in bucket.latent_shape._asdict().items()}
        for payload, content in payloads.items():
            row |= {f"{payload}_offset": offsets[payload], f"{payload}_size": len(content)}
        row |= {"llm_tokens": llm_tokens, "checksum": crc32(payloads.values()), **further}
        self._rows[key] = row

    def _check_key(self, key: str) -> None:
        if key in self._rows:
            raise UserError(f"{self.name}: key {key} is there already; keys must be unique over the data set")
        if "." in key or "/" in key:
            raise UserError(f"key {key!r} must not hold '.' or '/': webdataset would split it there")

    def _check(self, sample: ShardSample, bucket: Bucket) -> None:
        self._check_key(sample.key)
        check_fits(f"sample {sample.key}", bucket, sample)
        for llm, clip in ((sample.llm, sample.clip), *sample.captions.values()):
            if llm.ndim != 2 or clip.ndim != 2 or not len(llm):
                shapes = f"llm {list(llm.shape)}, clip {list(clip.shape)}"
                raise UserError(f"sample {sample.key}: text states must be [tokens, width]; got {shapes}")

    def _end_tar(self, complete: bool) -> str | None:
        try:
            # The end of the tar fails too where the disk is full.
            return self._tar.finish() if complete else None
        finally:
            self._tar.close()

    def _publish(self, checksum: str) -> None:
        record = {"name": self.name, "bytes": self._tar.size, "samples": len(self._rows), CHECKSUM: checksum}
        table = pa.Table.from_pylist(list(self._rows.values()), schema=INDEX_SCHEMA)
        # First the tar, then its index: an index without its tar must never exist.
        publish(self._temporary, self.folder / self.name)
        _write_parquet(table.replace_schema_metadata({"shard": json.dumps(record)}), index_part(self.folder, self.name))


class ShardDataset:
    """Samples by number, read by position; no tar is walked. Safe in worker processes and after a fork."""

    def __init__(self, folder: str | Path, verify: bool = True, read_attempts: int = 1) -> None:
        """Open a finished folder of shards.

        Args:
            folder: what `megatron-video data encode` wrote.
            verify: check each sample's checksum when it is read.
            read_attempts: how often a sample is read before it counts as damaged.

        Raises:
            UserError: no shards there, unfinished, of a newer schema, or an index that does not fit its buckets.
        """
        self.folder, self.verify, self.read_attempts = Path(folder), verify, read_attempts
        self.rows = open_index(self.folder)
        self._files: OrderedDict[str, int] = OrderedDict()
        self._null_text: tuple[torch.Tensor, torch.Tensor] | None = None

    @cached_property
    def index(self) -> pa.Table:
        """index.parquet as a table in memory, for tools that look at all of it; training does not."""
        return read_index(self.folder)

    @cached_property
    def dataset_info(self) -> DatasetInfo:
        """dataset_info.json with all its shards; `rows.info` has the rest of it without reading the file."""
        return read_info(self.folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> ShardSample:
        """Read a sample.

        Raises:
            DamagedSampleError: the shard is missing, ends early, or its bytes changed; names the file and the key.
        """
        row = self._row(number)
        sample = decode_sample(row.key, self._payloads(row), self._where(row))
        check_fits(self._where(row), parse_bucket(row.bucket), sample, self.rows.info)
        return sample

    def payloads(self, number: int) -> dict[str, bytes]:
        """The three payloads of a sample as they are stored, in the order of `PAYLOADS`; raises as `[number]` does."""
        return {name: bytes(content) for name, content in self._payloads(self._row(number)).items()}

    def metadata(self, number: int) -> dict[str, Any]:
        """What a sample's JSON says; its tensors are not read, and its checksum is not compared.

        Raises:
            DamagedSampleError: the shard is missing, ends early, or its bytes changed; names the file and the key.
        """
        row = self._row(number)
        try:
            values: dict[str, Any] = json.loads(bytes(self._read(row, "json", 0)[0]))
        except ValueError as error:
            raise DamagedSampleError(f"{self._where(row)}: cannot be decoded: {error}") from None
        return values

    def where(self, number: int) -> str:
        """File and key of a sample."""
        return self._where(self._row(number))

    def _row(self, number: int) -> IndexRow:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.rows.row(number)

    def _where(self, row: IndexRow) -> str:
        return f"{self.folder / row.shard}: sample {row.key}"

    def _payloads(self, row: IndexRow) -> dict[str, memoryview]:
        for attempt in range(self.read_attempts - 1):
            try:
                return self._read_once(row)
            except DamagedSampleError:
                # A hiccup of the network ends, and another descriptor may see another server.
                self._forget(row.shard)
                time.sleep(_FIRST_PAUSE * 4**attempt)
        return self._read_once(row)

    def _read_once(self, row: IndexRow) -> dict[str, memoryview]:
        checksum, payloads = 0, {}
        for payload in PAYLOADS:
            payloads[payload], checksum = self._read(row, payload, checksum)
        if self.verify and checksum != row.checksum:
            raise DamagedSampleError(
                f"{self._where(row)}: checksum differs from the index: the file is damaged; encode this shard again"
            )
        return payloads

    @property
    def null_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(llm [n, d_llm], clip [L_clip, d_clip]) bf16 of the empty caption, for text dropout."""
        if self._null_text is None:
            self._null_text = read_null_text(self.folder)
        return self._null_text

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors mean nothing in another process; they are opened again there.
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def _read(self, row: IndexRow, payload: str, checksum: int) -> tuple[memoryview, int]:
        """One payload, and the checksum of it and of those before it."""
        offset, size = row.places[payload]
        # Not a bytearray, which would be filled with zeros first.
        content = np.empty(size, np.uint8).data
        # Piece by piece: what was just read is still in the processor's cache when it is summed up.
        for start in range(0, size, _PIECE):
            piece = content[start : start + _PIECE]
            try:
                # A read at a position, so that threads and forked workers can share the descriptor.
                count = os.preadv(self._descriptor(row.shard), [piece], offset + start)
            except OSError as error:
                raise DamagedSampleError(f"{self._where(row)}: cannot be read: {error.strerror}") from None
            if count != len(piece):
                raise DamagedSampleError(f"{self._where(row)}: the file ends early; encode this shard again")
            checksum = crc32([piece], checksum) if self.verify else 0
        return content, checksum

    def _descriptor(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        descriptor = os.open(self.folder / shard, os.O_RDONLY)
        self._files[shard] = descriptor
        # Thousands of shards would run into the limit of open files.
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _forget(self, shard: str) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))


def copy_shard(dataset: ShardDataset, record: Mapping[str, Any], folder: Path, name: str, link: bool) -> None:
    """Put a finished shard into another folder under another name, byte for byte; as a hard link where `link` can.

    Args:
        record: the shard's entry in `dataset.dataset_info.shards`; its checksum is compared.

    Raises:
        UserError: the tar is missing, or changed since it was written.
    """
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    source = dataset.folder / record["name"]
    with appearing(folder / name) as temporary:
        _link_or_copy(source, temporary, link)
        if not is_intact(temporary, record):
            raise UserError(f"{source}: checksum differs: the file changed since it was written; encode it again")
    rows = dataset.index.filter(pc.equal(dataset.index["shard"], record["name"]))
    rows = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array([name] * len(rows), pa.string()))
    record = {**record, "name": name}
    _write_parquet(rows.replace_schema_metadata({"shard": json.dumps(record)}), index_part(folder, name))


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    if not source.is_file():
        raise UserError(f"{source}: missing; encode this shard again")
    if link:
        try:
            os.link(source, target)
            return
        except OSError as error:
            # Another file system, or one without links.
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
    shutil.copyfile(source, target)


def finish_dataset(folder: str | Path, info: DatasetInfo) -> DatasetInfo:
    """Join the shards' indices and write dataset_info.json, which makes the folder a finished data set.

    Raises:
        UserError: a key occurs in two shards.
    """
    folder = Path(folder)
    parts = sorted((folder / PARTS_FOLDER).glob("*.index.parquet"))
    records: list[dict[str, Any]] = []
    buckets: Counter[str] = Counter()
    with appearing(folder / INDEX_FILE) as temporary:
        _join(parts, temporary, records, buckets)
    values = asdict(info) | {
        # Shards of an older version are in it too; the index has the columns of this one.
        "schema_version": PAIRS_SCHEMA_VERSION if info.pairs else SHARD_SCHEMA_VERSION,
        "samples": sum(buckets.values()),
        "buckets": dict(sorted(buckets.items())),
        "shards": records,
        "files": {name: file_sha256(folder / name) for name in (INDEX_FILE, NULL_TEXT_FILE)},
    }
    if not info.pairs:
        # Readers of version 2 do not know the name.
        del values["pairs"]
    write_atomically(folder / INFO_FILE, json.dumps(values, indent=1).encode())
    try:
        build_index(folder)
    except UserError:
        # A folder with wrong rows must not look finished.
        (folder / INFO_FILE).unlink()
        raise
    return DatasetInfo(**values)


def _join(parts: Sequence[Path], target: Path, records: list[dict[str, Any]], buckets: Counter[str]) -> None:
    """Write the rows of all parts into one index; adds the shards' records and the samples of every bucket."""
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(target, INDEX_SCHEMA, compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part)
            records.append(json.loads(table.schema.metadata[b"shard"]))
            for row in pc.value_counts(table["bucket"]).to_pylist():
                buckets[row["values"]] += row["counts"]
            waiting.append(complete_index(table.replace_schema_metadata()))
            # A row group a shard would make a large index slow to read.
            if sum(map(len, waiting)) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        writer.write_table(pa.concat_tables([*waiting, INDEX_SCHEMA.empty_table()]))


def read_index(folder: Path) -> pa.Table:
    """Read index.parquet as a whole, with the columns of this version; `open_index` has checked its rows.

    Raises:
        UserError: unreadable, or wrong columns.
    """
    path = folder / INDEX_FILE
    try:
        index = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    check_index_columns(path, index.schema.names)
    return complete_index(index)


def _write_parquet(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())
