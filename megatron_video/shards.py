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
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.errors import UserError
from megatron_video.files import appearing
from megatron_video.shard_schema import (
    INDEX_FILE,
    INDEX_SCHEMA,
    INFO_FILE,
    MEMBER_SUFFIXES,
    NULL_TEXT_FILE,
    PARTS_FOLDER,
    PAYLOADS,
    SHARD_SCHEMA_VERSION,
    DatasetInfo,
    ShardSample,
    check_fits,
    check_index_bucket,
    crc32,
    decode_sample,
    encode_sample,
    file_sha256,
    index_part,
    refuse_duplicates,
    to_stored,
    write_atomically,
)
from megatron_video.shard_tar import ShardTar

_OPEN_SHARDS = 64


class ShardWriter:
    """Writes one shard. The tar and its index appear together when the `with` block ends well, else nothing does.

    The same samples give the same bytes.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
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

    def add(self, sample: ShardSample, bucket: Bucket) -> None:
        """Append a sample.

        Raises:
            UserError: the latent does not fit the bucket, the key is taken or has a dot, or the text has a wrong shape.
        """
        self._check(sample, bucket)
        self.add_encoded(sample.key, encode_sample(sample), bucket, len(sample.llm))

    def add_encoded(self, key: str, payloads: Mapping[str, bytes], bucket: Bucket, llm_tokens: int) -> None:
        """Append a sample by its three payloads, as `encode_sample` made them or `ShardDataset.payloads` read them.

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
        row |= {"llm_tokens": llm_tokens, "checksum": crc32(payloads.values())}
        self._rows[key] = row

    def _check_key(self, key: str) -> None:
        if key in self._rows:
            raise UserError(f"{self.name}: key {key} is there already; keys must be unique over the data set")
        if "." in key or "/" in key:
            raise UserError(f"key {key!r} must not hold '.' or '/': webdataset would split it there")

    def _check(self, sample: ShardSample, bucket: Bucket) -> None:
        self._check_key(sample.key)
        check_fits(f"sample {sample.key}", bucket, sample.moments)
        if sample.llm.ndim != 2 or sample.clip.ndim != 2 or not len(sample.llm):
            shapes = f"llm {list(sample.llm.shape)}, clip {list(sample.clip.shape)}"
            raise UserError(f"sample {sample.key}: text states must be [tokens, width]; got {shapes}")

    def _end_tar(self, complete: bool) -> str | None:
        try:
            # The end of the tar fails too where the disk is full.
            return self._tar.finish() if complete else None
        finally:
            self._tar.close()

    def _publish(self, checksum: str) -> None:
        record = {"name": self.name, "bytes": self._tar.size, "samples": len(self._rows), "sha256": checksum}
        table = pa.Table.from_pylist(list(self._rows.values()), schema=INDEX_SCHEMA)
        # First the tar, then its index: an index without its tar must never exist.
        os.replace(self._temporary, self.folder / self.name)
        _write_parquet(table.replace_schema_metadata({"shard": json.dumps(record)}), index_part(self.folder, self.name))


class ShardDataset:
    """Samples by number, read by position; no tar is walked. Safe in worker processes and after a fork."""

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """Open a finished folder of shards.

        Args:
            folder: what `megatron-video data encode` wrote.
            verify: check each sample's checksum when it is read.

        Raises:
            UserError: no shards there, unfinished, of a newer schema, or an index that does not fit its buckets.
        """
        self.folder, self.verify = Path(folder), verify
        self.dataset_info = read_info(self.folder)
        self.index = read_index(self.folder)
        # Plain arrays: an element of an Arrow column costs microseconds, an element of an array almost nothing.
        names = ["shard", "checksum", *(f"{p}_{what}" for p in PAYLOADS for what in ("offset", "size"))]
        self._columns = {name: self.index[name].to_numpy() for name in names}
        self._files: OrderedDict[str, int] = OrderedDict()
        self._null_text: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.index.num_rows

    def __getitem__(self, number: int) -> ShardSample:
        """Read a sample.

        Raises:
            UserError: the shard is missing, ends early, or its bytes changed; names the file and the key.
        """
        payloads = self.payloads(number)
        key, where = self.index["key"][number].as_py(), self._where(number)
        sample = decode_sample(key, payloads, where)
        check_fits(where, parse_bucket(self.index["bucket"][number].as_py()), sample.moments, self.dataset_info)
        return sample

    def payloads(self, number: int) -> dict[str, bytes]:
        """The three payloads of a sample as they are stored, in the order of `PAYLOADS`; raises as `[number]` does."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard, where = str(self._columns["shard"][number]), self._where(number)
        payloads = {payload: self._read(number, shard, payload, where) for payload in PAYLOADS}
        if self.verify and crc32(payloads.values()) != self._columns["checksum"][number]:
            raise UserError(f"{where}: checksum differs from the index: the file is damaged; encode this shard again")
        return payloads

    def _where(self, number: int) -> str:
        return f"{self.folder / str(self._columns['shard'][number])}: sample {self.index['key'][number].as_py()}"

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

    def _read(self, number: int, shard: str, payload: str, where: str) -> bytes:
        size, offset = int(self._columns[f"{payload}_size"][number]), int(self._columns[f"{payload}_offset"][number])
        # pread has no file position, so threads and forked workers can share the descriptor.
        content = os.pread(self._descriptor(shard), size, offset)
        if len(content) != size:
            raise UserError(f"{where}: the file ends early; encode this shard again")
        return content

    def _descriptor(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            descriptor = os.open(self.folder / shard, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.folder / shard}: cannot be opened: {error.strerror}") from None
        self._files[shard] = descriptor
        # Thousands of shards would run into the limit of open files.
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


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
        if file_sha256(temporary) != record["sha256"]:
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
    tables = [pq.read_table(part) for part in parts]
    index = pa.concat_tables([table.replace_schema_metadata() for table in tables] or [INDEX_SCHEMA.empty_table()])
    # Within a shard the writer has seen to it; here are all of them.
    refuse_duplicates(index)
    _write_parquet(index, folder / INDEX_FILE)
    values = asdict(info) | {
        "samples": index.num_rows,
        "buckets": dict(sorted(Counter(index["bucket"].to_pylist()).items())),
        "shards": [json.loads(table.schema.metadata[b"shard"]) for table in tables],
        "files": {name: file_sha256(folder / name) for name in (INDEX_FILE, NULL_TEXT_FILE)},
    }
    write_atomically(folder / INFO_FILE, json.dumps(values, indent=1).encode())
    return DatasetInfo(**values)


def read_info(folder: Path) -> DatasetInfo:
    """Read dataset_info.json.

    Raises:
        UserError: no folder, unfinished, unreadable, or of a newer schema.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        unfinished = any(folder.glob("*.tar"))
        hint = "encode did not finish; run it again" if unfinished else "`megatron-video data encode` writes shards"
        raise UserError(f"{folder}: no finished shards here ({INFO_FILE} is missing): {hint}")
    try:
        values = json.loads(path.read_text())
        version = int(values["schema_version"])
        if version > SHARD_SCHEMA_VERSION:
            raise UserError(f"{path}: shard schema {version}, this program knows up to {SHARD_SCHEMA_VERSION}")
        return DatasetInfo(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: {error}") from None


def read_index(folder: Path) -> pa.Table:
    """Read index.parquet; its latent sizes must be those of its buckets, and its keys unique.

    Raises:
        UserError: unreadable, wrong columns, a duplicate key, or a sample that does not fit its bucket.
    """
    path = folder / INDEX_FILE
    try:
        index = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if index.schema.names != INDEX_SCHEMA.names:
        raise UserError(f"{path}: columns {index.schema.names} are not those of a shard index")
    refuse_duplicates(index)
    for name in pc.unique(index["bucket"]).to_pylist():
        check_index_bucket(path, index.filter(pc.equal(index["bucket"], name)), parse_bucket(name))
    return index


def read_null_text(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(llm, clip) of the empty caption.

    Raises:
        UserError: missing or unreadable.
    """
    path = folder / NULL_TEXT_FILE
    try:
        tensors = load_tensors(path.read_bytes())
        return tensors["llm"], tensors["clip"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def write_null_text(folder: Path, llm: torch.Tensor, clip: torch.Tensor) -> None:
    """Store the states of the empty caption, [n, d_llm] and [L_clip, d_clip], as bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NULL_TEXT_FILE, dump_tensors({"llm": to_stored(llm), "clip": to_stored(clip)}))


def _write_parquet(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())
