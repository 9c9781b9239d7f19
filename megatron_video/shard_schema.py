"""What shards are made of: names of files and members, index columns, encoding of a sample, and the checks on it.

The writer and the reader (shards.py) and the verifier take everything from here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from megatron_video.buckets import Bucket
from megatron_video.errors import UserError
from megatron_video.files import file_sha256 as file_sha256
from megatron_video.files import write_atomically as write_atomically

# The same checksums, eight times as fast, where the package is installed.
try:
    from isal.isal_zlib import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

# Raised when a reader of the old layout would misread the new one. Version 2: the columns of _VERSION_2, and several
# captions of one sample. Version 3: folders of preference pairs, and only these.
SHARD_SCHEMA_VERSION = 2
PAIRS_SCHEMA_VERSION = 3
INDEX_FILE = "index.parquet"
INFO_FILE = "dataset_info.json"
NULL_TEXT_FILE = "null_text.safetensors"
PARTS_FOLDER = "parts"
# The order in the tar, and in the checksum.
PAYLOADS = ("latent", "text", "json")
MEMBER_SUFFIXES = {"latent": "latent.safetensors", "text": "text.safetensors", "json": "json"}

_VERSION_1 = (
    [("key", pa.string()), ("shard", pa.string()), ("bucket", pa.string())]
    + [(name, pa.int32()) for name in ("frames", "height", "width")]
    + [(name, pa.int32()) for name in ("latent_frames", "latent_height", "latent_width", "llm_tokens")]
    + [(f"{payload}_{what}", pa.int64()) for payload in PAYLOADS for what in ("offset", "size")]
    + [("checksum", pa.int64())]  # crc32 over the three payloads in order
)
# May be null, and are null in folders that were written before.
_VERSION_2 = [
    ("caption_tokens", pa.list_(pa.int32())),  # Step-LLM tokens of each kind of DatasetInfo.captions; 0: has none
    ("subset", pa.string()),  # strictest subset of `data filter`
    ("weight", pa.float32()),  # of `data balance`; null counts as 1
]
INDEX_SCHEMA = pa.schema(_VERSION_1 + _VERSION_2)


Content = bytes | bytearray | memoryview
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


class DamagedSampleError(UserError):
    """One sample cannot be read, or is not what was written; the others may be well."""


Text = tuple[torch.Tensor, torch.Tensor]
"""(llm [n, d_llm], clip [L_clip, d_clip]) bf16 of one caption."""


class ShardSample(NamedTuple):
    """One encoded sample."""

    key: str
    moments: torch.Tensor
    """bf16 [t, 2z, h, w]: mean, then log-variance."""
    llm: torch.Tensor
    """bf16 [n, d_llm], n tokens, no padding; of the first caption."""
    clip: torch.Tensor
    """bf16 [L_clip, d_clip], of the first caption."""
    metadata: dict[str, Any]
    captions: Mapping[str, Text] = MappingProxyType({})
    """States of every kind of caption that the sample has, the first included; {}: it has one, of no named kind."""
    loser: torch.Tensor | None = None
    """bf16 [t, z, h, w]: the latent that lost against `moments`, which then is a latent too, [t, z, h, w], and not a
    posterior to draw from; None: the sample is no pair."""

    @property
    def mean_and_deviation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, each fp64 [t, z, h, w]; a winner is what it is."""
        if self.loser is not None:
            return self.moments.double(), torch.zeros_like(self.moments, dtype=torch.float64)
        # Here: most readers of shards have no use for the Video-VAE.
        from megatron_video.vae.autoencoder import LOGVAR_RANGE

        mean, logvar = self.moments.double().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset_info.json says of a folder of shards."""

    vae_fingerprint: str
    """Hash of the Video-VAE's files that made the latents."""
    text_fingerprint: str
    """Hash of the text encoders' files."""
    latent_channels: int
    """z; the moments have 2z channels."""
    llm_dim: int
    clip_dim: int
    clip_tokens: int
    """Slots of the CLIP states of every sample."""
    captions: list[str] = field(default_factory=list)
    """Kinds of captions that samples may have, in order; []: each has one, of no named kind."""
    pairs: bool = False
    """Whether every sample is a pair of generated latents of one text, of which one was preferred."""
    schema_version: int = SHARD_SCHEMA_VERSION
    samples: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    """Samples per bucket."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """name, bytes, samples and xxh3_128 (in older ones sha256) of each tar."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of the index and the null text."""


def check_fits(where: str, bucket: Bucket, sample: ShardSample, info: DatasetInfo | None = None) -> None:
    """Refuse a sample that is not of the bucket's latent shape, or a pair among samples and the reverse.

    Raises:
        UserError: names the sample, the bucket and both shapes.
    """
    frames, height, width = bucket.latent_shape
    if info is not None and info.pairs != (sample.loser is not None):
        raise UserError(f"{where}: {'no pair among' if info.pairs else 'a pair, and not one of'} the folder's samples")
    # Without the data set's info (in the writer) the number of channels is not known, only that there is one.
    per_channel, symbol = (1, "z") if sample.loser is not None else (2, "2z")
    latents = {"moments": sample.moments} if sample.loser is None else {"winner": sample.moments, "loser": sample.loser}
    for name, latent in latents.items():
        shape = list(latent.shape)
        channels: Any = shape[1] if len(shape) == 4 else symbol
        channels = per_channel * info.latent_channels if info else channels
        if shape != [frames, channels, height, width]:
            raise UserError(
                f"{where}: {name} {shape} do not fit bucket {bucket.name}, "
                f"which takes {[frames, channels, height, width]} (latent frames, {symbol}, rows, columns)"
            )
    if sample.loser is not None and sample.loser.shape != sample.moments.shape:
        shapes = f"winner {list(sample.moments.shape)}, loser {list(sample.loser.shape)}"
        raise UserError(f"{where}: the members of a pair differ in shape: {shapes}")


def encode_sample(sample: ShardSample) -> dict[str, bytes]:
    """The three payloads of a sample, in the order of `PAYLOADS`."""
    # The first caption stands where the only one of other samples does; any reader finds it there.
    further = list(sample.captions.items())[1:]
    texts = {"llm": sample.llm, "clip": sample.clip}
    texts |= {
        f"{name}.{kind}": states for kind, text in further for name, states in zip(("llm", "clip"), text, strict=True)
    }
    metadata = {"key": sample.key, **sample.metadata} | (
        {"caption_kinds": [*sample.captions]} if sample.captions else {}
    )
    return {
        "latent": dump_tensors(_stored_latents(sample)),
        "text": dump_tensors({name: to_stored(states) for name, states in texts.items()}),
        # Sorted, so that equal metadata gives equal bytes.
        "json": json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode(),
    }


def _stored_latents(sample: ShardSample) -> dict[str, torch.Tensor]:
    if sample.loser is None:
        return {"moments": to_stored(sample.moments)}
    return {"winner": to_stored(sample.moments), "loser": to_stored(sample.loser)}


def decode_sample(key: str, payloads: Mapping[str, Content], where: str) -> ShardSample:
    """The sample that `encode_sample` made; its tensors lie in `payloads`, nothing is copied.

    Raises:
        UserError: a payload cannot be decoded; the message starts with `where`.
    """
    try:
        latents = _view_tensors(payloads["latent"])
        loser = latents.get("loser")
        moments = latents["moments" if loser is None else "winner"]
        text, metadata = _view_tensors(payloads["text"]), json.loads(bytes(payloads["json"]))
        kinds = metadata.get("caption_kinds", [])
        captions = {kind: (text[f"llm.{kind}"], text[f"clip.{kind}"]) for kind in kinds[1:]}
        first = text["llm"], text["clip"]
        return ShardSample(key, moments, *first, metadata, {kinds[0]: first, **captions} if kinds else {}, loser)
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise DamagedSampleError(f"{where}: cannot be decoded: {error}") from None


def _view_tensors(content: Content) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in memory, where they lie: `safetensors.torch.load` would copy them.

    Raises:
        ValueError, KeyError: not such a file, or one that ends early.
    """
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(bytes(content[8 : 8 + length]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if end - start != count * dtype.itemsize:
            raise ValueError(f"{name}: {end - start} bytes for {shape} of {dtype}")
        view = torch.frombuffer(content, dtype=dtype, count=count, offset=8 + length + start) if count else None
        tensors[name] = torch.empty(shape, dtype=dtype) if view is None else view.view(shape)
    return tensors


def to_stored(tensor: torch.Tensor) -> torch.Tensor:
    """bf16, on the CPU, contiguous."""
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()


def crc32(contents: Iterable[Content], checksum: int = 0) -> int:
    """crc32 over several byte strings as if they were one, that follow one with `checksum`."""
    for content in contents:
        checksum = _crc32(content, checksum)
    return checksum


def caption_tokens(sample: ShardSample, kinds: Sequence[str]) -> list[int] | None:
    """The index's column of that name, for a data set with these kinds of captions.

    Raises:
        UserError: the sample has a caption of another kind.
    """
    unknown = [kind for kind in sample.captions if kind not in kinds]
    if unknown:
        raise UserError(f"sample {sample.key} has captions of {unknown}, the data set of {list(kinds)}")
    counts = [len(sample.captions[kind][0]) if kind in sample.captions else 0 for kind in kinds]
    return counts if sample.captions else None


def check_index_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a table that is no shard index.

    Raises:
        UserError: names the columns.
    """
    if list(names) not in ([name for name, _ in _VERSION_1], INDEX_SCHEMA.names):
        raise UserError(f"{path}: columns {list(names)} are not those of a shard index")


def complete_index(table: pa.Table) -> pa.Table:
    """An index of any version with all columns of this one; those that it is too old for are null."""
    for name in INDEX_SCHEMA.names[table.num_columns :]:
        table = table.append_column(INDEX_SCHEMA.field(name), pa.nulls(table.num_rows, INDEX_SCHEMA.field(name).type))
    return table


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
        if version > PAIRS_SCHEMA_VERSION:
            raise UserError(f"{path}: shard schema {version}, this program knows up to {PAIRS_SCHEMA_VERSION}")
        return DatasetInfo(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: {error}") from None


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


def refuse_duplicates(index: pa.Table) -> None:
    """Keys must be unique over the data set.

    Raises:
        UserError: names the first key that occurs twice, and its shards.
    """
    counts = pc.value_counts(index["key"])
    taken = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(taken):
        shards = index.filter(pc.equal(index["key"], taken[0]))["shard"].to_pylist()
        raise UserError(f"key {taken[0]} occurs in {', '.join(shards)}; keys must be unique over the data set")


def check_index_bucket(path: Path, rows: pa.Table, bucket: Bucket) -> None:
    """All `rows` of the index are of `bucket`; their latent sizes must be the bucket's.

    Raises:
        UserError: names the first sample that does not fit.
    """
    found = np.stack([rows[f"latent_{name}"].to_numpy() for name in ("frames", "height", "width")], axis=1)
    wrong = np.flatnonzero((found != np.asarray(bucket.latent_shape)).any(axis=1))
    if len(wrong):
        key, shape = rows["key"][int(wrong[0])].as_py(), found[wrong[0]].tolist()
        raise UserError(
            f"{path}: sample {key}: latent {shape} does not fit bucket {bucket.name}, "
            f"which takes {list(bucket.latent_shape)}"
        )


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def index_part(folder: Path, name: str) -> Path:
    """Index of one shard; it is there exactly if the shard is complete."""
    return folder / PARTS_FOLDER / f"{name.removesuffix('.tar')}.index.parquet"
