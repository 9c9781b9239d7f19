"""`megatron-video data verify`: read everything in a folder of shards and compare it with itself.

Each tar against its checksum and, walked as a tar, against the index; each sample against its checksum, its bucket and
the widths of the data set, with finite values; the manifest against the index; the null text. All faults are listed,
each with its shard and key, and the exit code is 2 if there is one. --remove-damaged takes the files with a fault
away: the command that made the folder, given again, then makes these and no others, with the bytes that they had.
"""

from __future__ import annotations

import json
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch

from data_prep.encode import MANIFEST_FILE
from data_prep.encode_shard import rows_part
from data_prep.shard_folder import LOCK_FILE, PLAN_FILE
from data_prep.stage import StageParser
from data_prep.workers import progress
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest
from megatron_video.run_lock import run_lock
from megatron_video.shard_index_open import is_true
from megatron_video.shard_schema import (
    INDEX_FILE,
    INFO_FILE,
    MEMBER_SUFFIXES,
    NULL_TEXT_FILE,
    PARTS_FOLDER,
    DatasetInfo,
    ShardSample,
    file_sha256,
    index_part,
)
from megatron_video.shard_tar import is_intact
from megatron_video.shards import ShardDataset, read_null_text

_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class VerifyReport:
    """What was read, and what is wrong."""

    folder: str
    shards: int
    samples: int
    megabytes: float
    tokens: int
    """Step-LLM tokens of all captions."""
    seconds: float
    faults: list[str]
    damaged: list[str]
    """Names of the files with a fault that can be made again, mostly shards."""


class Fault(NamedTuple):
    """Something that is wrong."""

    text: str
    file: str | None = None
    """Name of the file that would have to be made again."""


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = StageParser(prog="megatron-video data verify", description=__doc__)
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="SHARDS", help="folder of shards")
    remove = "take files with a fault away, so that the command that made them makes them again"
    parser.add_argument("--remove-damaged", action="store_true", help=remove)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = run(arguments.source)
    _print(report, arguments.json)
    if report.damaged and arguments.remove_damaged:
        remove_files(arguments.source, report.damaged)
    if report.faults:
        raise UserError(_verdict(report, arguments.remove_damaged))
    return 0


def run(folder: Path) -> VerifyReport:
    """Check a finished folder of shards.

    Raises:
        UserError: no finished shards there, or an index that is wrong in itself.
    """
    started = time.monotonic()
    dataset = ShardDataset(folder)
    info = dataset.dataset_info
    # Cheap and telling ones first; every step runs, as one fault often explains another.
    steps = (_check_files(dataset), _check_samples(dataset), _check_manifest(dataset), _check_null_text(dataset))
    faults = [fault for step in steps for fault in step]
    return VerifyReport(
        folder=str(folder),
        shards=len(info.shards),
        samples=len(dataset),
        megabytes=round(sum(shard["bytes"] for shard in info.shards) / 1e6, 2),
        tokens=pc.sum(dataset.index["llm_tokens"]).as_py() or 0,
        faults=[fault.text for fault in faults],
        damaged=sorted({fault.file for fault in faults if fault.file}),
        seconds=round(time.monotonic() - started, 2),
    )


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Make a finished folder an unfinished one that lacks these files.

    Raises:
        UserError: the folder does not know how it was made, or another run holds it.
    """
    if not (folder / PARTS_FOLDER / PLAN_FILE).is_file():
        raise UserError(
            f"--remove-damaged: {folder} has no {PARTS_FOLDER}/{PLAN_FILE}, so no command could make its files again; "
            "take them from a copy"
        )
    with run_lock(folder / LOCK_FILE, folder):
        # First what says that the folder is finished, last the tar: a kill between them loses no more than is lost.
        (folder / INFO_FILE).unlink()
        for name in names:
            for path in (rows_part(folder, name), index_part(folder, name), folder / name):
                # Only a shard has parts; without them it is made again.
                path.unlink(missing_ok=True)


def _verdict(report: VerifyReport, removed: bool) -> str:
    found = f"{report.folder}: {len(report.faults)} faults"
    if not report.damaged:
        return f"{found}: {report.faults[0]}"
    names = ", ".join(report.damaged[:3]) + (" ..." if len(report.damaged) > 3 else "")
    if removed:
        return f"{found}; removed {names}: the command that made the folder makes them again"
    return f"{found}, in {names}; with --remove-damaged the command that made the folder makes them again"


def _check_files(dataset: ShardDataset) -> Iterator[Fault]:
    """Checksums of whole files, and the walk of each tar against the index."""
    info = dataset.dataset_info
    if not is_true(dataset.rows, dataset.folder):
        yield Fault(f"{dataset.rows.path}: differs from what {INDEX_FILE} says; delete it, it is made again")
    for name, checksum in info.files.items():
        path = dataset.folder / name
        if not path.is_file() or file_sha256(path) != checksum:
            yield Fault(f"{path}: missing or changed since it was written", name)
    listed = {shard["name"] for shard in info.shards}
    for stray in sorted({path.name for path in dataset.folder.glob("*.tar")} - listed):
        yield Fault(f"{dataset.folder / stray}: a tar that is not in the index; remove it")
    for shard in progress(info.shards, len(info.shards), "verify", unit="shard"):
        yield from _check_tar(dataset, shard)


def _check_tar(dataset: ShardDataset, shard: dict[str, Any]) -> Iterator[Fault]:
    name = shard["name"]
    path = dataset.folder / name
    if not path.is_file():
        yield Fault(f"{path}: missing, with its {shard['samples']} samples", name)
        return
    if not is_intact(path, shard):
        yield Fault(f"{path}: checksum differs: the file changed since it was written", name)
    expected = _expected_members(dataset.index.filter(pc.equal(dataset.index["shard"], name)))
    # Walked by another reader than the one that trusts the index.
    try:
        with tarfile.open(path) as tar:
            found = {member.name: (member.offset_data, member.size) for member in tar}
    except (tarfile.TarError, OSError) as error:
        yield Fault(f"{path}: not a readable tar: {error}", name)
        return
    if wrong := sorted({member for member, _ in set(found.items()) ^ set(expected.items())}):
        yield Fault(f"{path}: {len(wrong)} members are not where the index says, such as {wrong[0]}", name)


def _expected_members(rows: pa.Table) -> dict[str, tuple[int, int]]:
    return {
        f"{row['key']}.{suffix}": (row[f"{payload}_offset"], row[f"{payload}_size"])
        for row in rows.to_pylist()
        for payload, suffix in MEMBER_SUFFIXES.items()
    }


def _check_samples(dataset: ShardDataset) -> Iterator[Fault]:
    # One that is missing was said to be.
    there = {shard["name"] for shard in dataset.dataset_info.shards if (dataset.folder / shard["name"]).is_file()}
    for number in progress(range(len(dataset)), len(dataset), "verify", unit="sample"):
        shard = dataset.index["shard"][number].as_py()
        if shard not in there:
            continue
        try:
            sample = dataset[number]
        except UserError as error:
            yield Fault(str(error), shard)
            continue
        where = f"{dataset.folder / shard}: sample {sample.key}"
        yield from (Fault(f"{where}: {fault}", shard) for fault in _sample_faults(sample, dataset, number))


def _sample_faults(sample: ShardSample, dataset: ShardDataset, number: int) -> Iterator[str]:
    tokens, bucket = dataset.index["llm_tokens"][number].as_py(), dataset.index["bucket"][number].as_py()
    info = dataset.rows.info
    yield from _text_faults(sample.llm, sample.clip, info)
    for kind, (llm, clip) in sample.captions.items():
        yield from (f"caption {kind}: {fault}" for fault in _text_faults(llm, clip, info))
    if len(sample.llm) != tokens:
        yield f"{len(sample.llm)} Step-LLM tokens, the index says {tokens}"
    listed = dataset.index["caption_tokens"][number].as_py()
    found = [len(sample.captions[kind][0]) if kind in sample.captions else 0 for kind in info.captions]
    if (listed or [0] * len(found)) != found:
        yield f"captions of {dict(zip(info.captions, found, strict=True))} tokens, the index says {listed}"
    if not torch.isfinite(sample.moments).all():
        yield "moments that are not finite"
    if sample.loser is not None and not torch.isfinite(sample.loser).all():
        yield "a loser that is not finite"
    if sample.metadata.get("key") != sample.key or sample.metadata.get("bucket", bucket) != bucket:
        yield "the metadata names another key or bucket"


def _text_faults(llm: torch.Tensor, clip: torch.Tensor, info: DatasetInfo) -> Iterator[str]:
    if llm.ndim != 2 or not len(llm) or llm.shape[1] != info.llm_dim:
        yield f"Step-LLM states {list(llm.shape)}, not [tokens, {info.llm_dim}]"
    if list(clip.shape) != [info.clip_tokens, info.clip_dim]:
        yield f"CLIP states {list(clip.shape)}, not {[info.clip_tokens, info.clip_dim]}"
    if not (torch.isfinite(llm).all() and torch.isfinite(clip).all()):
        yield "text states that are not finite"


def _check_manifest(dataset: ShardDataset) -> Iterator[Fault]:
    path = dataset.folder / MANIFEST_FILE
    try:
        table = read_manifest(path)
    except UserError as error:
        yield Fault(str(error) if path.is_file() else f"{path}: missing", MANIFEST_FILE)
        return
    kept = table.filter(table["dropped_by"].is_null())
    # Key to (shard, bucket) on both sides.
    wanted = dict(zip(kept["clip_id"].to_pylist(), _pairs(kept), strict=True))
    found = dict(zip(dataset.index["key"].to_pylist(), _pairs(dataset.index), strict=True))
    for key in sorted(wanted.keys() ^ found.keys()):
        yield Fault(f"{path}: clip {key} is in only one of manifest and index", MANIFEST_FILE)
    for key in sorted(wanted.keys() & found.keys()):
        if wanted[key] != found[key]:
            where = f"in {wanted[key]} by the manifest, in {found[key]} by the index"
            yield Fault(f"{path}: clip {key} is {where}", MANIFEST_FILE)


def _pairs(table: pa.Table) -> Iterable[tuple[str, str]]:
    return list(zip(table["shard"].to_pylist(), table["bucket"].to_pylist(), strict=True))


def _check_null_text(dataset: ShardDataset) -> Iterator[Fault]:
    try:
        llm, clip = read_null_text(dataset.folder)
    except UserError as error:
        yield Fault(str(error), NULL_TEXT_FILE)
        return
    yield from (Fault(f"null text: {fault}", NULL_TEXT_FILE) for fault in _text_faults(llm, clip, dataset.dataset_info))


def _print(report: VerifyReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    state = f"{len(report.faults)} faults" if report.faults else "all good"
    print(f"verify: {report.folder}: {state}")
    for name in ("shards", "samples", "megabytes", "tokens", "seconds"):
        print(f"  {name:<12}{getattr(report, name)}")
    for fault in report.faults[:_FAULTS_SHOWN]:
        print(f"    {fault}")
    if len(report.faults) > _FAULTS_SHOWN:
        print(f"    and {len(report.faults) - _FAULTS_SHOWN} more; --json lists all")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
