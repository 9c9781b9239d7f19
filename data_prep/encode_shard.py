"""One shard, from plan to files: what every encoding process does, alone or beside others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data_prep.clip_encoder import ClipEncoder, Suspicion
from data_prep.encode_plan import PlannedShard
from megatron_video.manifest import Row, table_from_rows, write_manifest
from megatron_video.shard_schema import NULL_TEXT_FILE, PARTS_FOLDER, DatasetInfo, write_atomically
from megatron_video.shards import ShardWriter, write_null_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ENCODERS_FILE = "encoders.json"


@dataclass(frozen=True)
class EncodeJob:
    """What a process needs to encode any shard of a plan; small, and can be sent to it."""

    folder: Path
    vae: Path
    text: Path
    prints: dict[str, str]
    """Fingerprints of the encoders: "vae" and "text"."""
    dtype: str
    batch_size: int
    decoder: str
    device: str
    decode_threads: int
    torch_threads: int | None = None
    """Threads of CPU arithmetic; None leaves torch's own number."""
    captions: tuple[str, ...] = ()
    """Kinds of captions; (): the column `caption` alone."""

    def on(self, device: str) -> EncodeJob:
        """The same job on another device."""
        return replace(self, device=device)

    def load(self) -> ClipEncoder:
        """The encoders; also leaves in the folder what is known of them."""
        if self.torch_threads is not None:
            torch.set_num_threads(self.torch_threads)
        device, dtype = torch.device(self.device), DTYPES[self.dtype]
        encoder = ClipEncoder(self.vae, self.text, device, dtype, self.decoder, self.captions)
        _write_encoders(self.folder, encoder, self.prints)
        return encoder


def write_shard(
    shard: PlannedShard,
    job: EncodeJob,
    encoder: ClipEncoder,
    threads: ThreadPoolExecutor,
    suspicion: Suspicion | None = None,
) -> Iterator[Row]:
    """Encode a shard and write it, its index and its rows; yields each row when it is done."""
    rows = []
    with ShardWriter(job.folder, shard.name, job.captions) as writer:
        for row, sample in encoder.encode_shard(shard, job.batch_size, threads, suspicion):
            # A failed clip is in the rows, and only there.
            if sample is not None:
                writer.add(sample, shard.bucket, subset=row["subset"], weight=row["weight"])
                row = {**row, "shard": shard.name}
            rows.append(row)
            yield row
    # Written last: the shard's tar and index are complete exactly if its rows are there.
    write_manifest(table_from_rows(rows), rows_part(job.folder, shard.name))


def rows_part(folder: Path, name: str) -> Path:
    """The manifest rows of one shard; there exactly if the shard is complete."""
    return folder / PARTS_FOLDER / f"{name.removesuffix('.tar')}.rows.parquet"


def encoders_known(folder: Path) -> bool:
    """Whether an encoder was loaded for this folder before."""
    return (folder / PARTS_FOLDER / _ENCODERS_FILE).is_file() and (folder / NULL_TEXT_FILE).is_file()


def read_encoders(folder: Path) -> DatasetInfo:
    """Fingerprints and widths of the encoders; the shards are not in it yet."""
    return DatasetInfo(**json.loads((folder / PARTS_FOLDER / _ENCODERS_FILE).read_text()))


def _write_encoders(folder: Path, encoder: ClipEncoder, prints: dict[str, str]) -> None:
    """The null text, and the facts that dataset_info.json will state; every process writes the same bytes."""
    if encoders_known(folder):
        return
    (null,) = encoder.text_states([""])
    write_null_text(folder, null.llm, null.clip)
    llm_dim, clip_dim = encoder.text.widths
    info = DatasetInfo(
        vae_fingerprint=prints["vae"],
        text_fingerprint=prints["text"],
        latent_channels=encoder.vae.config.latent_channels,
        llm_dim=llm_dim,
        clip_dim=clip_dim,
        clip_tokens=encoder.text.clip_length,
        captions=list(encoder.kinds),
    )
    write_atomically(folder / PARTS_FOLDER / _ENCODERS_FILE, json.dumps(asdict(info)).encode())
