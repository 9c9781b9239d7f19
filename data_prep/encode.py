"""`megatron-video data encode`: clips -> Video-VAE moments and text states -> webdataset shards with an index.

Every clip goes to the bucket of its length and nearest aspect ratio, black borders cut off, the middle frames at their
own rate. A shard appears complete or not at all; a stopped run goes on with the shards that are missing and makes the
same bytes. A clip that fails is a dropped row of the manifest that lies beside the shards.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from data_prep.caption_config import KINDS
from data_prep.decode import DECODERS, choose_decoder
from data_prep.devices import find_device
from data_prep.encode_plan import STAGE, PlannedShard, plan_shards
from data_prep.encode_shard import DTYPES, EncodeJob, encoders_known, read_encoders, rows_part, write_shard
from data_prep.encode_workers import Fleet
from data_prep.shard_folder import claimed
from data_prep.stage import StageReport, make_report, print_report, stage_parser
from data_prep.workers import Shard, default_workers, progress
from megatron_video.buckets import Bucket, parse_buckets
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.manifest import Row, kept_rows, read_manifest, table_from_rows, write_manifest
from megatron_video.run_lock import LockedError
from megatron_video.shard_schema import INFO_FILE, file_sha256, write_atomically
from megatron_video.shards import finish_dataset, read_info
from megatron_video.text import text_fingerprint, text_folders

MANIFEST_FILE = "manifest.parquet"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class EncodeSettings:
    """What the bytes of the shards depend on, besides the clips and the weights."""

    buckets: tuple[Bucket, ...]
    samples_per_shard: int = 256
    batch_size: int = 8
    """Clips per pass of the Video-VAE."""
    dtype: str = "float32"
    """Of the encoders' arithmetic; storage is bfloat16."""
    decoder: str = "pyav"
    """Reads the videos; another one gives slightly other pixels."""
    captions: tuple[str, ...] = ()
    """Kinds of captions that are encoded beside each other, the first being every sample's own; (): the column
    `caption` alone."""

    def __post_init__(self) -> None:
        for option, value in (("samples-per-shard", self.samples_per_shard), ("batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"--{option} {value} must be at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        """As plain values; folders that were begun before there were kinds keep theirs."""
        return {name: value for name, value in asdict(self).items() if name != "captions" or value}


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    arguments = _parser().parse_args(argv)
    print_report(run_arguments(arguments), arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    # What concerns the machine (device, decoder) is looked at where the stage runs, not where a recipe is read.
    parser = stage_parser(
        STAGE, __doc__, output="SHARD_FOLDER", workers=False, check=_settings, gpu=lambda arguments: arguments.vae
    )
    add = parser.add_argument
    add("--vae", type=Path, required=True, metavar="PATH", help="folder of the Video-VAE, or a released .safetensors")
    add("--text", type=Path, required=True, metavar="FOLDER", help="text encoders, with clip/ and step_llm/ in it")
    add("--buckets", required=True, metavar="SIZE,...", help="FRAMESxHEIGHTxWIDTH, such as 1x48x48,17x48x48,17x48x64")
    add("--samples-per-shard", type=int, default=256, metavar="N", help="default %(default)s")
    add("--batch-size", type=int, default=8, metavar="N", help="clips per pass of the Video-VAE (default %(default)s)")
    add("--captions", metavar="KIND,...", help="encode captions of these kinds (short, dense, title)")
    add("--dtype", choices=list(DTYPES), default="float32", help="arithmetic (default %(default)s); bf16 is stored")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="cpu, cuda (all GPUs) or one, cuda:1 (default here: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes with both encoders each (default: one a GPU, or one)")
    add("--decode-threads", type=int, metavar="N", help="of each worker (default: CPUs divided by workers)")
    add("--torch-threads", type=int, metavar="N", help="of each worker on CPUs (default: CPUs divided by workers)")
    add("--shard", metavar="I/N", help="do part I (from 0) of N of the shards; the last one joins them")
    add("--decoder", choices=DECODERS, default="auto", help="auto: DALI (NVDEC) on a GPU, else PyAV")
    return parser


def _settings(arguments: argparse.Namespace, decoder: str = "pyav") -> EncodeSettings:
    return EncodeSettings(
        parse_buckets(arguments.buckets),
        arguments.samples_per_shard,
        arguments.batch_size,
        arguments.dtype,
        decoder,
        parse_kinds(arguments.captions),
    )


def run_arguments(arguments: argparse.Namespace) -> StageReport:
    """`run` with the values of a parsed command line."""
    settings = _settings(arguments, choose_decoder(arguments.decoder, arguments.device))
    return run(
        arguments.source,
        arguments.out,
        arguments.vae,
        arguments.text,
        settings,
        device=arguments.device,
        workers=arguments.workers,
        decode_threads=arguments.decode_threads,
        torch_threads=arguments.torch_threads,
        share=Shard.parse(arguments.shard) if arguments.shard else None,
    )


def run(
    manifest_in: Path,
    shard_folder: Path,
    vae: Path,
    text: Path,
    settings: EncodeSettings,
    device: str = "cpu",
    workers: int | None = None,
    decode_threads: int | None = None,
    torch_threads: int | None = None,
    share: Shard | None = None,
) -> StageReport:
    """Encode the kept clips of a manifest into `shard_folder`; the number of workers does not change its bytes.

    Args:
        vae: folder of the Video-VAE, or a released .safetensors file.
        text: folder with both text encoders.
        device: "cpu", "cuda" (all GPUs in turn) or one GPU such as "cuda:1".
        workers: processes, each with both encoders; None for one a GPU. One works in this process.
        decode_threads: threads of each worker that decode video; None shares out the CPUs.
        torch_threads: threads of each worker's arithmetic on CPUs; None shares out torch's own number. Another number
            may round the last bit of a sum in another way, as another kind of CPU does.
        share: make only this part of the shards; the run that finds all of them there finishes the folder.

    Raises:
        UserError: the folder holds shards of something else or is in use, an input is missing or does not fit, the
            disk is full, or workers keep dying.
    """
    started = time.monotonic()
    for name, number in (("--decode-threads", decode_threads), ("--torch-threads", torch_threads)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number} must be at least 1")
    devices = _devices(device, workers)
    table = read_manifest(manifest_in)
    _check_kinds(table, settings.captions)
    kept = kept_rows(table)
    plan, unplaced = plan_shards(kept, settings.buckets, settings.samples_per_shard, settings.captions)
    if not plan:
        why = f", such as {unplaced[0]['source']}: {unplaced[0]['drop_reason']}" if unplaced else ""
        raise UserError(f"{manifest_in}: nothing to encode among its {len(kept)} kept clips{why}")
    # Hashes of the weights: a retrained encoder under the old path must not continue the old shards.
    prints = {"vae": vae_fingerprint(vae), "text": text_fingerprint(*text_folders(text))}
    made_with = settings.identity | prints | {"input": file_sha256(manifest_in)}
    job = EncodeJob(
        folder=shard_folder,
        vae=vae,
        text=text,
        prints=prints,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        decoder=settings.decoder,
        device=devices[0],
        decode_threads=decode_threads or max(1, default_workers() // len(devices)),
        torch_threads=torch_threads,
        captions=settings.captions,
    )
    output = _Output(shard_folder, made_with, table, plan, unplaced, started)
    output.details.update(device=device, decoder=settings.decoder)
    with claimed(shard_folder, STAGE, made_with, share):
        if output.finished:
            return output.report(read_manifest(shard_folder / MANIFEST_FILE), up_to_date=True)
        mine = [shard for number, shard in enumerate(plan) if share is None or number in share]
        output.details.update(_encode_missing(mine, job, devices))
        if share is None:
            return output.finish()
    return output.finish_if_last(mine)


def parse_kinds(text: str | None) -> tuple[str, ...]:
    """Read "dense,short".

    Raises:
        UserError: not a kind, or one twice.
    """
    kinds = tuple(kind.strip() for kind in text.split(",")) if text else ()
    if len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise UserError(f"--captions {text}: give each of {', '.join(KINDS)} at most once")
    return kinds


def _check_kinds(table: pa.Table, kinds: Sequence[str]) -> None:
    for kind in kinds:
        if table[f"caption_{kind}"].null_count == table.num_rows:
            raise UserError(
                f"--captions {kind}: no clip has a caption of that kind; `megatron-video data caption` first"
            )


@dataclass
class _Output:
    """The folder that a run fills: its last steps, and the report."""

    folder: Path
    made_with: Mapping[str, Any]
    table: pa.Table
    """The manifest that came in."""
    plan: Sequence[PlannedShard]
    unplaced: Sequence[Row]
    started: float
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return (self.folder / INFO_FILE).is_file()

    def finish(self) -> StageReport:
        """Join what the shards' writers left; every shard must be there."""
        rows = _joined(self.table, self.plan, self.unplaced, self.folder)
        write_manifest(rows, self.folder / MANIFEST_FILE)
        # The very last step: until then the folder counts as unfinished.
        finish_dataset(self.folder, read_encoders(self.folder))
        report = self.report(read_manifest(self.folder / MANIFEST_FILE))
        write_atomically(self.folder / REPORT_FILE, json.dumps(asdict(report), ensure_ascii=False).encode())
        return report

    def finish_if_last(self, mine: Sequence[PlannedShard]) -> StageReport:
        """Of an array's tasks, the one that finds all shards there finishes; the others report their own, `mine`."""
        try:
            # The whole can be held only when no other task is at work: the last of them finishes.
            with claimed(self.folder, STAGE, self.made_with):
                if not self.finished and not _missing(self.plan, self.folder):
                    return self.finish()
        except LockedError:
            pass
        parts = [read_manifest(rows_part(self.folder, shard.name)) for shard in mine]
        return self.report(pa.concat_tables(parts or [table_from_rows([])]))

    def report(self, result: pa.Table, up_to_date: bool = False) -> StageReport:
        details = (_figures(self.folder) if self.finished else {}) | self.details
        return make_report(STAGE, result, self.folder, self.table.num_rows, self.started, up_to_date, details)


def _devices(device: str, workers: int | None) -> list[str]:
    """The device of each worker."""
    gpus = torch.cuda.device_count() if str(find_device(device)) == "cuda" else 0
    workers = workers if workers is not None else max(1, gpus)
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    return [f"cuda:{number % gpus}" if gpus else device for number in range(workers)]


def _encode_missing(plan: Sequence[PlannedShard], job: EncodeJob, devices: Sequence[str]) -> dict[str, Any]:
    """Make the shards that are not there yet; figures for the report."""
    # What is missing is known before the models run, so the progress bar tells the truth.
    missing = _missing(plan, job.folder)
    clips = sum(len(shard.rows) for shard in missing)
    if len(devices) == 1 or not missing:
        for _ in progress(_alone(missing, job), clips, STAGE):
            pass
        return {"workers": 1}
    # Together the workers have as many threads as one process would.
    threads = job.torch_threads or max(1, torch.get_num_threads() // len(devices))
    fleet = Fleet(replace(job, torch_threads=threads), devices)
    for _ in progress(fleet.run(missing), clips, STAGE):
        pass
    return {"workers": len(devices), "worker deaths": fleet.deaths, "shards redone": fleet.redone}


def _missing(plan: Sequence[PlannedShard], folder: Path) -> list[PlannedShard]:
    return [shard for shard in plan if not rows_part(folder, shard.name).is_file()]


def _alone(missing: Sequence[PlannedShard], job: EncodeJob) -> Iterator[Row]:
    if not missing and encoders_known(job.folder):
        return
    encoder = job.load()
    with ThreadPoolExecutor(job.decode_threads) as threads:
        for shard in missing:
            yield from write_shard(shard, job, encoder, threads)


def _joined(table: pa.Table, plan: Sequence[PlannedShard], unplaced: Sequence[Row], folder: Path) -> pa.Table:
    """The input's rows in their order, with what became of each."""
    # Clip ids are unique among kept rows (the plan refuses others).
    done = {row["clip_id"]: row for shard in plan for row in read_manifest(rows_part(folder, shard.name)).to_pylist()}
    done |= {row["clip_id"]: row for row in unplaced}
    return table_from_rows(row if row["dropped_by"] else done[row["clip_id"]] for row in table.to_pylist())


def _figures(folder: Path) -> dict[str, Any]:
    info = read_info(folder)
    return {
        "samples": info.samples,
        "shards": len(info.shards),
        "megabytes": round(sum(shard["bytes"] for shard in info.shards) / 1e6, 2),
        "buckets": info.buckets,
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
