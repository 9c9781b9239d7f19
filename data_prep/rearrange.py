"""What merge, split and reshard do: other folders of the same samples, without encoding again.

All three read and write one sample at a time, compare the checksum of every sample that they copy, and go on where
they were when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.encode import MANIFEST_FILE
from data_prep.shard_folder import claimed
from data_prep.stage import StageParser
from data_prep.workers import progress
from megatron_video.buckets import parse_bucket
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest, write_manifest
from megatron_video.shard_schema import (
    INFO_FILE,
    PARTS_FOLDER,
    DatasetInfo,
    file_sha256,
    index_part,
    refuse_duplicates,
    shard_name,
)
from megatron_video.shards import ShardDataset, ShardWriter, copy_shard, finish_dataset, read_info, write_null_text

# What must be equal for samples to lie in one folder.
_ENCODING = ("vae_fingerprint", "text_fingerprint", "latent_channels", "llm_dim", "clip_dim", "clip_tokens", "captions")
# Columns of the index that a copied sample takes along, beside those that every sample has.
_CARRIED = ("caption_tokens", "subset", "weight")
_HASH_RANGE = 1 << 64

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RearrangeReport:
    """What lies where after merge, split or reshard."""

    stage: str
    folders: dict[str, int]
    """Samples of every folder written."""
    shards: int
    megabytes: float
    seconds: float
    up_to_date: bool
    """Nothing had to be done."""


def rearrange_parser(stage: str, description: str | None) -> StageParser:
    """The arguments that the three commands have, but --in."""
    parser = StageParser(prog=f"megatron-video data {stage}", description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def add_shard_options(parser: argparse.ArgumentParser, seed: str) -> None:
    """Where the shards come from and how they are cut, for split and reshard; `seed` is that option's help."""
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="SHARDS", help="folder of shards")
    parser.add_argument("--samples-per-shard", type=int, default=256, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", help=seed)


def merge(sources: Sequence[Path], out: Path, link: bool = True) -> RearrangeReport:
    """All shards of `sources` in one folder, in that order; linked where the file system can, else copied.

    Raises:
        UserError: fewer than two different folders, other encoders, a sample in two folders, or a damaged tar.
    """
    if len({source.resolve() for source in sources}) < max(2, len(sources)):
        raise UserError(f"--in {' '.join(map(str, sources))}: two or more different folders are needed to merge")
    started = time.monotonic()
    datasets = [ShardDataset(source) for source in sources]
    _refuse_common_samples(datasets)
    tars = [(dataset, record) for dataset in datasets for record in dataset.dataset_info.shards]

    def write() -> None:
        for number, (dataset, record) in enumerate(progress(tars, len(tars), "merge", unit="shard")):
            if not index_part(out, shard_name(number)).is_file():
                copy_shard(dataset, record, out, shard_name(number), link)

    fresh = _write_folder(out, "merge", {}, datasets, write)
    return _report("merge", [out], started, not fresh)


def reshard(source: Path, out: Path, samples_per_shard: int, seed: int | None = None) -> RearrangeReport:
    """The same samples in shards of another size; with a seed, shuffled within each bucket.

    Raises:
        UserError: no samples per shard, or a damaged sample.
    """
    started = time.monotonic()
    dataset = ShardDataset(source)
    groups = _groups(dataset, np.arange(len(dataset)), samples_per_shard, seed)
    settings = {"size": samples_per_shard, "seed": seed}
    fresh = _write_folder(out, "reshard", settings, [dataset], lambda: _copy_samples(dataset, groups, out, "reshard"))
    return _report("reshard", [out], started, not fresh)


def split(
    source: Path, out: Path, shares: Mapping[str, float], samples_per_shard: int, seed: int = 0
) -> RearrangeReport:
    """Folders `out`/NAME with about these shares of the samples; clips of one file go to one folder.

    Raises:
        UserError: no samples per shard, a folder left empty, or a damaged sample.
    """
    started = time.monotonic()
    dataset = ShardDataset(source)
    keys = dataset.index["key"].to_pylist()
    parts = np.asarray([_part_of(key, shares, seed) for key in keys], dtype=object)
    empty = [name for name in shares if not (parts == name).any()]
    if empty:
        raise UserError(f"--parts leaves {', '.join(empty)} without a sample of {len(dataset)}; give larger shares")
    fresh = False
    for name in shares:
        groups = _groups(dataset, np.flatnonzero(parts == name), samples_per_shard, None)
        settings = {"size": samples_per_shard, "seed": seed, "shares": dict(shares), "part": name}

        def write(name: str = name, groups: list[Integers] = groups) -> None:
            _copy_samples(dataset, groups, out / name, f"split {name}")

        def takes(source: str, name: str = name) -> bool:
            return _part_of(source, shares, seed) == name

        fresh |= _write_folder(out / name, "split", settings, [dataset], write, takes)
    return _report("split", [out / name for name in shares], started, not fresh)


def parse_shares(text: str) -> dict[str, float]:
    """Read "train=98,test=2"; the numbers need not sum to anything.

    Raises:
        UserError: another form, a name twice, or a share that is not positive.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not name or name in shares or not share > 0 or "/" in name or name.startswith("."):
            raise UserError(
                f"--parts {text!r}: {part.strip()!r} is not NAME=SHARE with a new name and a positive share"
            )
        shares[name] = share
    if len(shares) < 2:
        raise UserError(f"--parts {text!r} names one folder; a split needs two or more")
    return shares


def check_one_encoding(datasets: Sequence[ShardDataset]) -> DatasetInfo:
    """The encoding that all have in common.

    Raises:
        UserError: encoders or widths differ.
    """
    first = datasets[0]
    for dataset in datasets[1:]:
        for name in _ENCODING:
            ours, other = getattr(first.dataset_info, name), getattr(dataset.dataset_info, name)
            if ours != other:
                raise UserError(
                    f"{dataset.folder} and {first.folder} were encoded differently ({name}: {other} and {ours})"
                )
    return replace(first.dataset_info, samples=0, buckets={}, shards=[], files={})


def _refuse_common_samples(datasets: Sequence[ShardDataset]) -> None:
    columns = [d.index.select(["key"]).append_column("shard", _constant(str(d.folder), len(d))) for d in datasets]
    refuse_duplicates(pa.concat_tables(columns))


def _constant(value: str, length: int) -> pa.Array:
    return pa.repeat(pa.scalar(value), length)


def _part_of(key: str, shares: Mapping[str, float], seed: int) -> str:
    """The part that a clip, or a source file, belongs to."""
    # A clip's key begins with the hash of its file: training and test must not see one video.
    content = key.split("-")[0]
    digest = hashlib.blake2b(f"{seed}/{content}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / _HASH_RANGE * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return name


def _groups(dataset: ShardDataset, samples: Integers, size: int, seed: int | None) -> list[Integers]:
    """Numbers of the samples of every new shard: bucket by bucket, `size` at a time."""
    if size < 1:
        raise UserError(f"--samples-per-shard {size} must be at least 1")
    if seed is not None and seed < 0:
        raise UserError(f"--seed {seed} must not be negative")
    buckets = np.asarray(dataset.index["bucket"].to_pylist())[samples]
    groups: list[Integers] = []
    for number, bucket in enumerate(np.unique(buckets)):
        members = samples[buckets == bucket]
        if seed is not None:
            members = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(members)
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def _copy_samples(dataset: ShardDataset, groups: Sequence[Integers], out: Path, title: str) -> None:
    """Write one shard a group; those that are there stay."""
    missing = [(number, group) for number, group in enumerate(groups) if not _is_there(out, number)]
    steps = (step for number, group in missing for step in _copy_shard_samples(dataset, group, out, shard_name(number)))
    for _ in progress(steps, sum(len(group) for _, group in missing), title, unit="sample"):
        pass


def _is_there(out: Path, number: int) -> bool:
    return index_part(out, shard_name(number)).is_file()


def _copy_shard_samples(dataset: ShardDataset, samples: Integers, out: Path, name: str) -> Iterator[int]:
    with ShardWriter(out, name) as writer:
        for number in samples.tolist():
            row = dataset.index.slice(number, 1).to_pylist()[0]
            # The bytes as they are; reading them has compared their checksum.
            payloads, further = dataset.payloads(number), {name: row[name] for name in _CARRIED}
            writer.add_encoded(row["key"], payloads, parse_bucket(row["bucket"]), row["llm_tokens"], further)
            yield number


def _write_folder(
    out: Path,
    stage: str,
    settings: Mapping[str, Any],
    datasets: Sequence[ShardDataset],
    write: Callable[[], None],
    takes: Callable[[str], bool] = lambda source: True,
) -> bool:
    """Everything around the shards that `write` makes; False if all was there already.

    `takes` tells by its hash or path whether a dropped row's source belongs to this folder.
    """
    info = check_one_encoding(datasets)
    tables = [read_manifest(dataset.folder / MANIFEST_FILE) for dataset in datasets]
    sources = [file_sha256(dataset.folder / INFO_FILE) for dataset in datasets]
    with claimed(out, stage, {**settings, "input": "/".join(sources)}):
        if (out / INFO_FILE).is_file():
            return False
        write_null_text(out, *datasets[0].null_text)
        write()
        write_manifest(_manifest(pa.concat_tables(tables), out, takes), out / MANIFEST_FILE)
        finish_dataset(out, info)
    return True


def _manifest(table: pa.Table, out: Path, takes: Callable[[str], bool]) -> pa.Table:
    """The rows of the samples that were written, with their new shards, and the dropped rows that belong to them."""
    parts = sorted((out / PARTS_FOLDER).glob("*.index.parquet"))
    index = pa.concat_tables([pq.read_table(part, columns=["key", "shard"]) for part in parts])
    places = pc.index_in(table["clip_id"], value_set=index["key"])
    is_kept = pc.is_null(table["dropped_by"])
    dropped_sources = zip(table["content_hash"].to_pylist(), table["source"].to_pylist(), strict=True)
    taken = pa.array([takes(content or source) for content, source in dropped_sources])
    wanted = pc.if_else(is_kept, pc.is_valid(places), taken)
    shards = pc.if_else(is_kept, index["shard"].combine_chunks().take(places.combine_chunks()), table["shard"])
    return table.set_column(table.schema.get_field_index("shard"), "shard", shards).filter(wanted)


def _report(stage: str, folders: Sequence[Path], started: float, up_to_date: bool) -> RearrangeReport:
    infos = {str(folder): read_info(folder) for folder in folders}
    shards = [shard for info in infos.values() for shard in info.shards]
    return RearrangeReport(
        stage=stage,
        folders={folder: info.samples for folder, info in infos.items()},
        shards=len(shards),
        megabytes=round(sum(shard["bytes"] for shard in shards) / 1e6, 2),
        seconds=round(time.monotonic() - started, 2),
        up_to_date=up_to_date,
    )


def print_rearranged(report: RearrangeReport, as_json: bool) -> None:
    """The report as lines, or as one JSON object."""
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    state = "up to date, nothing redone" if report.up_to_date else f"{report.seconds:.1f} s"
    print(f"{report.stage}: {report.shards} shards, {report.megabytes} MB ({state})")
    for folder, samples in report.folders.items():
        print(f"  {folder}: {samples} samples")
