"""`megatron-video data encode`: clips -> Video-VAE moments and text states -> webdataset shards with an index.

Every clip goes to the bucket of its length and nearest aspect ratio, black borders cut off, the middle frames at their
own rate. A shard appears complete or not at all; a stopped run goes on with the shards that are missing and makes the
same bytes. A clip that fails is a dropped row of the manifest that lies beside the shards.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from data_prep.clip_encoder import ClipEncoder, vae_fingerprint
from data_prep.encode_plan import STAGE, PlannedShard, plan_shards
from data_prep.stage import StageReport, fingerprint_of, make_report, print_report, stage_parser
from data_prep.workers import progress
from megatron_video.buckets import Bucket, parse_buckets
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, kept_rows, read_manifest, table_from_rows, write_manifest
from megatron_video.shard_schema import INFO_FILE, PARTS_FOLDER, DatasetInfo, file_sha256, write_atomically
from megatron_video.shards import ShardWriter, finish_dataset, read_info, write_null_text
from megatron_video.text import text_fingerprint, text_folders

MANIFEST_FILE = "manifest.parquet"
REPORT_FILE = "report.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EncodeSettings:
    """What the bytes of the shards depend on, besides the clips and the weights."""

    buckets: tuple[Bucket, ...]
    samples_per_shard: int = 256
    batch_size: int = 8
    """Clips per pass of the Video-VAE."""
    dtype: str = "float32"
    """Of the encoders' arithmetic; storage is bfloat16."""


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, output="SHARD_FOLDER")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the Video-VAE, or a released .safetensors")
    parser.add_argument("--text", type=Path, required=True, help="folder with the text encoders clip/ and step_llm/")
    parser.add_argument("--buckets", required=True, help="FRAMESxHEIGHTxWIDTH,...; such as 1x48x48,17x48x48,17x48x64")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="clips per pass of the Video-VAE")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="arithmetic; bfloat16 is stored")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    print_report(run_arguments(arguments), arguments.json)
    return 0


def run_arguments(arguments: argparse.Namespace) -> StageReport:
    """`run` with the values of a parsed command line."""
    settings = EncodeSettings(
        parse_buckets(arguments.buckets), arguments.samples_per_shard, arguments.batch_size, arguments.dtype
    )
    return run(
        arguments.source,
        arguments.out,
        arguments.vae,
        arguments.text,
        settings,
        device=arguments.device,
        workers=arguments.workers,
    )


def run(
    manifest_in: Path,
    shard_folder: Path,
    vae: Path,
    text: Path,
    settings: EncodeSettings,
    device: str = "cpu",
    workers: int = 1,
) -> StageReport:
    """Encode the kept clips of a manifest into `shard_folder`.

    Args:
        vae: folder of the Video-VAE, or a released .safetensors file.
        text: folder with both text encoders.
        workers: threads that decode video.

    Raises:
        UserError: the folder holds shards of something else or is in use, or an input is missing or does not fit.
    """
    started = time.monotonic()
    table = read_manifest(manifest_in)
    plan, unplaced = plan_shards(kept_rows(table), settings.buckets, settings.samples_per_shard)
    # Hashes of the weights: a retrained encoder under the old path must not continue the old shards.
    prints = {"vae": vae_fingerprint(vae), "text": text_fingerprint(*text_folders(text))}
    fingerprint = fingerprint_of(STAGE, asdict(settings) | prints, file_sha256(manifest_in))
    with _locked(shard_folder):
        _claim(shard_folder, fingerprint)
        up_to_date = (shard_folder / INFO_FILE).is_file()
        if not up_to_date:
            encoder = ClipEncoder(vae, text, torch.device(device), DTYPES[settings.dtype])
            _encode_missing(plan, shard_folder, encoder, settings.batch_size, workers)
            write_manifest(_joined(table, plan, unplaced, shard_folder), shard_folder / MANIFEST_FILE)
            # The very last step: until then the folder counts as unfinished.
            finish_dataset(shard_folder, _dataset_info(encoder, prints))
        result = read_manifest(shard_folder / MANIFEST_FILE)
        report = make_report(
            STAGE, result, shard_folder, table.num_rows, started, up_to_date, _figures(shard_folder, device)
        )
        if not up_to_date:
            write_atomically(shard_folder / REPORT_FILE, json.dumps(asdict(report), ensure_ascii=False).encode())
    return report


def _encode_missing(
    plan: Sequence[PlannedShard], folder: Path, encoder: ClipEncoder, batch_size: int, workers: int
) -> None:
    (null,) = encoder.text_states([""])
    write_null_text(folder, null.llm, null.clip)
    # What is missing is known before the models run, so the progress bar tells the truth.
    missing = [shard for shard in plan if not _rows_part(folder, shard).is_file()]
    with ThreadPoolExecutor(workers) as threads:
        rows = (row for shard in missing for row in _write_shard(shard, folder, encoder, batch_size, threads))
        for _ in progress(rows, sum(len(shard.rows) for shard in missing), STAGE):
            pass


def _dataset_info(encoder: ClipEncoder, prints: dict[str, str]) -> DatasetInfo:
    llm_dim, clip_dim = encoder.text.widths
    return DatasetInfo(
        vae_fingerprint=prints["vae"],
        text_fingerprint=prints["text"],
        latent_channels=encoder.vae.config.latent_channels,
        llm_dim=llm_dim,
        clip_dim=clip_dim,
        clip_tokens=encoder.text.clip_length,
    )


def _write_shard(
    shard: PlannedShard, folder: Path, encoder: ClipEncoder, batch_size: int, threads: ThreadPoolExecutor
) -> Iterator[Row]:
    rows = []
    with ShardWriter(folder, shard.name) as writer:
        for row, sample in encoder.encode_shard(shard, batch_size, threads):
            # A failed clip is in the rows, and only there.
            if sample is not None:
                writer.add(sample, shard.bucket)
                row = {**row, "shard": shard.name}
            rows.append(row)
            yield row
    # Written last: the shard's tar and index are complete exactly if its rows are there.
    write_manifest(table_from_rows(rows), _rows_part(folder, shard))


def _rows_part(folder: Path, shard: PlannedShard) -> Path:
    return folder / PARTS_FOLDER / f"{shard.name.removesuffix('.tar')}.rows.parquet"


def _joined(table: pa.Table, plan: Sequence[PlannedShard], unplaced: Sequence[Row], folder: Path) -> pa.Table:
    """The input's rows in their order, with what became of each."""
    # Clip ids are unique among kept rows (the plan refuses others).
    done = {row["clip_id"]: row for shard in plan for row in read_manifest(_rows_part(folder, shard)).to_pylist()}
    done |= {row["clip_id"]: row for row in unplaced}
    return table_from_rows(row if row["dropped_by"] else done[row["clip_id"]] for row in table.to_pylist())


def _figures(folder: Path, device: str) -> dict[str, Any]:
    info = read_info(folder)
    return {
        "samples": info.samples,
        "shards": len(info.shards),
        "megabytes": round(sum(shard["bytes"] for shard in info.shards) / 1e6, 2),
        "buckets": info.buckets,
        "device": device,
    }


def _claim(folder: Path, fingerprint: str) -> None:
    """Mark the folder as this plan's, and clear what a killed run left half written."""
    mark = folder / PARTS_FOLDER / "plan"
    if mark.is_file():
        if mark.read_text() != fingerprint:
            raise UserError(
                f"--out {folder} holds shards of another manifest, other encoders or other settings; "
                "name a new folder or remove this one"
            )
    elif any(folder.glob("*.tar")) or (folder / INFO_FILE).exists():
        raise UserError(f"--out {folder} holds files that this command did not write; name a new folder")
    # Under the lock nobody else can be writing them.
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(f"{PARTS_FOLDER}/.*.tmp")):
        leftover.unlink()
    mark.parent.mkdir(exist_ok=True)
    write_atomically(mark, fingerprint.encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run a folder; the lock goes with the process, also when it is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {folder}: another encode is writing there; wait for it or stop it") from None
        yield


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
