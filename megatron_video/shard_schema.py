"""What shards are made of: names of files and members, index columns, encoding of a sample, and the checks on it.

The writer and the reader (shards.py) and the verifier take everything from here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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

# Raised when a reader of the old layout would misread the new one.
SHARD_SCHEMA_VERSION = 1
INDEX_FILE = "index.parquet"
INFO_FILE = "dataset_info.json"
NULL_TEXT_FILE = "null_text.safetensors"
PARTS_FOLDER = "parts"
# The order in the tar, and in the checksum.
PAYLOADS = ("latent", "text", "json")
MEMBER_SUFFIXES = {"latent": "latent.safetensors", "text": "text.safetensors", "json": "json"}

INDEX_SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.string()), ("bucket", pa.string())]
    + [(name, pa.int32()) for name in ("frames", "height", "width")]
    + [(name, pa.int32()) for name in ("latent_frames", "latent_height", "latent_width", "llm_tokens")]
    + [(f"{payload}_{what}", pa.int64()) for payload in PAYLOADS for what in ("offset", "size")]
    + [("checksum", pa.int64())]  # crc32 over the three payloads in order
)


class ShardSample(NamedTuple):
    """One encoded sample."""

    key: str
    moments: torch.Tensor
    """bf16 [t, 2z, h, w]: mean, then log-variance."""
    llm: torch.Tensor
    """bf16 [n, d_llm], n tokens, no padding."""
    clip: torch.Tensor
    """bf16 [L_clip, d_clip]."""
    metadata: dict[str, Any]


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
    schema_version: int = SHARD_SCHEMA_VERSION
    samples: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    """Samples per bucket."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """name, bytes, samples, sha256 of each tar."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of the index and the null text."""


def check_fits(where: str, bucket: Bucket, moments: torch.Tensor, info: DatasetInfo | None = None) -> None:
    """Refuse moments that are not [t, 2z, h, w] of the bucket's latent shape.

    Raises:
        UserError: names the sample, the bucket and both shapes.
    """
    # Without the data set's info (in the writer) the number of channels is not known, only that there is one.
    shape = list(moments.shape)
    frames, height, width = bucket.latent_shape
    channels = 2 * info.latent_channels if info else (shape[1] if len(shape) == 4 else "2z")
    if shape != [frames, channels, height, width]:
        raise UserError(
            f"{where}: moments {shape} do not fit bucket {bucket.name}, "
            f"which takes {[frames, channels, height, width]} (latent frames, 2z, rows, columns)"
        )


def encode_sample(sample: ShardSample) -> dict[str, bytes]:
    """The three payloads of a sample, in the order of `PAYLOADS`."""
    return {
        "latent": dump_tensors({"moments": to_stored(sample.moments)}),
        "text": dump_tensors({"llm": to_stored(sample.llm), "clip": to_stored(sample.clip)}),
        # Sorted, so that equal metadata gives equal bytes.
        "json": json.dumps({"key": sample.key, **sample.metadata}, ensure_ascii=False, sort_keys=True).encode(),
    }


def decode_sample(key: str, payloads: Mapping[str, bytes], where: str) -> ShardSample:
    """The sample that `encode_sample` made.

    Raises:
        UserError: a payload cannot be decoded; the message starts with `where`.
    """
    try:
        moments = load_tensors(payloads["latent"])["moments"]
        text = load_tensors(payloads["text"])
        return ShardSample(key, moments, text["llm"], text["clip"], json.loads(payloads["json"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{where}: cannot be decoded: {error}") from None


def to_stored(tensor: torch.Tensor) -> torch.Tensor:
    """bf16, on the CPU, contiguous."""
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()


def crc32(contents: Iterable[bytes]) -> int:
    """crc32 over several byte strings as if they were one."""
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    return checksum


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
