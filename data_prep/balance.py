"""`megatron-video data balance`: concepts by K-means, outliers, near-duplicates, and a sampling weight a clip.

Embeddings come from a file (NAME.npy with NAME.ids.txt, or Parquet with clip_id and embedding) or from a local CLIP
model. Filled are cluster, cluster_count (clips in the cluster before anything is removed), center_similarity, weight
and duplicate_of. Dropped are clips that are alone and far from their centre, and near-duplicates of a better clip: by
cosine inside a cluster, and by perceptual hash anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.manifest_stream import iter_manifest
from data_prep.parquet_columns import replace_columns
from data_prep.parts import Parts, clear_parts, output_lock
from data_prep.stage import (
    StageReport,
    check_folder,
    check_output,
    fingerprint_of,
    finished_fingerprint,
    make_report,
    print_report,
    stage_metadata,
    stage_parser,
)
from data_prep.workers import default_workers
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.files import appearing, file_sha256
from megatron_video.fingerprint import fingerprint_files
from megatron_video.manifest import SCHEMA, read_manifest

try:
    from data_prep.balance_report import write_balance_report
    from data_prep.balance_steps import Balanced, BalanceSettings, balance_vectors
    from data_prep.embeddings import Numbers, open_vectors
except ImportError as error:
    raise UserError(f"balance needs {error.name}: pip install 'megatron-video[data]'") from None

STAGE = "balance"
OnMissing = Literal["error", "drop"]
# Not columns of the manifest, but made of them: a larger picture and a longer clip are better.
_DERIVED = ("pixels", "frames")
_FILLED = (
    "cluster",
    "cluster_count",
    "center_similarity",
    "weight",
    "duplicate_of",
    "dropped_by",
    "drop_reason",
)
_SIZES = ("width", "height", "crop_width", "crop_height", "start_frame", "end_frame")
_HASH_BLOCK = 65536
_LOOKED_AT = ("clip_id", "source", "phash", *_SIZES)


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    arguments = _parser().parse_args(argv)
    embeddings = arguments.embeddings or _embedded(arguments)
    report = run(
        arguments.source, arguments.out, embeddings, _settings(arguments), arguments.on_missing, arguments.report
    )
    print_report(report, arguments.json)
    return 0


def run(
    manifest_in: Path,
    manifest_out: Path,
    embeddings: Path,
    settings: BalanceSettings,
    on_missing: OnMissing = "error",
    report_folder: Path | None = None,
) -> StageReport:
    """Balance the kept clips of a manifest.

    Args:
        embeddings: one vector for every kept clip.
        on_missing: what a kept clip without a vector is: an error, or a dropped row.
        report_folder: where tables and plots go; None = OUT.report.

    Raises:
        UserError: embeddings that do not fit the manifest, or settings that do not fit the data.
    """
    started = time.monotonic()
    check_output(manifest_in, manifest_out)
    folder = report_folder or manifest_out.with_name(f"{manifest_out.stem}.report")
    check_folder(folder, "--report")
    print_of = fingerprint_files([path for path in (embeddings, embeddings.with_suffix(".ids.txt")) if path.is_file()])
    described = {**asdict(settings), "embeddings": print_of, "on_missing": on_missing}
    fingerprint = fingerprint_of(STAGE, described, file_sha256(manifest_in))
    with output_lock(manifest_out):
        if finished_fingerprint(manifest_out) == fingerprint:
            done = read_manifest(manifest_out)
            return make_report(STAGE, done, manifest_out, done.num_rows, started, up_to_date=True)
        # The one part is what a stopped run had: centres, and mapped vectors.
        work = Parts(manifest_out, fingerprint, total=1, part_rows=1, shard=None).folder
        clear_parts(manifest_out, keep=work)
        filled, balanced, details = _balance(manifest_in, embeddings, settings, on_missing, work)
        write_balance_report(folder, balanced, settings, details)
        _write(manifest_in, manifest_out, filled, fingerprint)
        clear_parts(manifest_out)
    return make_report(STAGE, filled, manifest_out, filled.num_rows, started, details={**details, "plots": str(folder)})


def _balance(
    manifest_in: Path, embeddings: Path, settings: BalanceSettings, on_missing: OnMissing, work: Path
) -> tuple[pa.Table, Balanced, dict[str, Any]]:
    table = _read(manifest_in, settings.keep_best)
    rows = np.flatnonzero(table["dropped_by"].is_null().to_numpy())
    clips = table.take(pa.array(rows))
    vectors = open_vectors(embeddings, clips["clip_id"], work)
    lost = int((vectors.place < 0).sum())
    if lost and on_missing == "error":
        example = clips["clip_id"][int(np.flatnonzero(vectors.place < 0)[0])]
        raise UserError(
            f"--embeddings {embeddings} has none for {lost} of {len(rows)} kept clips, such as {example}; "
            "make them, or give --on-missing drop"
        )
    balanced = balance_vectors(vectors, best_first(clips, settings.keep_best), _hashes(clips), settings, work)
    return _filled(table, clips, rows, balanced), balanced, _figures(balanced)


def _read(manifest: Path, keep_best: Sequence[str]) -> pa.Table:
    """The columns that are looked at or filled: of all of them ten million rows would be tens of gigabytes."""
    named = [name.removeprefix("-") for name in keep_best]
    wanted = {*_LOOKED_AT, *_FILLED, *(name for name in named if name in SCHEMA.names)}
    return pa.concat_tables(iter_manifest(manifest, [name for name in SCHEMA.names if name in wanted]))


def _write(manifest_in: Path, manifest_out: Path, filled: pa.Table, fingerprint: str) -> None:
    schema = pa.schema([SCHEMA.field(name) for name in _FILLED])
    with appearing(manifest_out) as temporary:
        replace_columns(manifest_in, temporary, schema, [filled.select(_FILLED)], stage_metadata(fingerprint))


def best_first(clips: pa.Table, names: Sequence[str]) -> Numbers:
    """All clips by these columns, nulls last; then by clip_id, so that no order is left to chance."""
    by_id = np.empty(clips.num_rows, np.int64)
    by_id[pc.sort_indices(clips["clip_id"]).to_numpy()] = np.arange(clips.num_rows)
    keys: list[np.ndarray] = [by_id]
    for name in reversed(names):
        values = _quality(clips, name.removeprefix("-")).cast(pa.float64()).to_numpy()
        signed = values if name.startswith("-") else -values
        keys.append(np.where(np.isnan(signed), np.inf, signed))
    # The last key is the first to decide.
    return np.lexsort(keys)


def _quality(clips: pa.Table, name: str) -> pa.ChunkedArray:
    if name == "pixels":
        # Inside black borders where they are known.
        width, height = (pc.coalesce(clips[f"crop_{side}"], clips[side]) for side in ("width", "height"))
        return pc.multiply(width.cast(pa.int64()), height.cast(pa.int64()))
    if name == "frames":
        return pc.subtract(clips["end_frame"], clips["start_frame"])
    _refuse_unless_number(name)
    return clips[name]


def _hashes(clips: pa.Table) -> np.ndarray | None:
    """uint8 [n, bytes] of the phash column, all zeros where there is none; None if no clip has one."""
    column = clips["phash"].combine_chunks()
    lengths = pc.drop_null(pc.binary_length(column))
    if not len(lengths):
        return None
    size = pc.max(lengths).as_py()
    if pc.min(lengths).as_py() != size or size % 2:
        raise UserError(f"phash: hashes of {pc.min(lengths)} and of {size} hex digits cannot be compared")
    hashes = np.empty((len(column), size // 2), np.uint8)
    for start in range(0, len(column), _HASH_BLOCK):
        text = "".join(pc.fill_null(column.slice(start, _HASH_BLOCK), "0" * size).to_pylist())
        hashes[start : start + _HASH_BLOCK] = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, size // 2)
    return hashes


def _filled(table: pa.Table, clips: pa.Table, rows: Numbers, balanced: Balanced) -> pa.Table:
    has = balanced.cluster >= 0
    keeper = balanced.keeper
    ids = clips["clip_id"].combine_chunks()
    duplicate_of = ids.take(pa.array(keeper, mask=keeper < 0))
    count = balanced.cluster_count[balanced.cluster]
    found = {
        "cluster": (balanced.cluster, has),
        "cluster_count": (count, has),
        "center_similarity": (balanced.center_similarity, has),
        "weight": (balanced.weight.astype(np.float32), balanced.kept),
    }
    for name, (values, valid) in found.items():
        table = _scattered(table, name, rows, pa.array(values, mask=~valid))
    table = _scattered(table, "duplicate_of", rows, duplicate_of)
    return _drop(table, rows, balanced, duplicate_of)


def _drop(table: pa.Table, rows: Numbers, balanced: Balanced, duplicate_of: pa.Array) -> pa.Table:
    reason = pc.if_else(
        pa.array(balanced.by_hash),
        pc.binary_join_element_wise("duplicate by hash: of ", duplicate_of, ""),
        pc.binary_join_element_wise("duplicate by embedding: of ", duplicate_of, ""),
    )
    near = pc.cast(pc.round(pa.array(balanced.center_similarity), 4), pa.string())
    far = pc.binary_join_element_wise("outlier: cosine ", near, " with the centre of its cluster", "")
    reason = pc.if_else(pa.array(balanced.outlier), far, reason)
    reason = pc.if_else(pa.array(balanced.cluster < 0), "no embedding: missing, zero or not finite", reason)
    gone = pa.array(~balanced.kept)
    by, why = (pa.nulls(len(rows), pa.string()) for _ in range(2))
    table = _scattered(table, "dropped_by", rows, pc.if_else(gone, STAGE, by))
    return _scattered(table, "drop_reason", rows, pc.if_else(gone, reason, why))


def _scattered(table: pa.Table, name: str, rows: Numbers, values: pa.Array) -> pa.Table:
    """The table with these values of a column in the given rows; the others stay."""
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    kind = SCHEMA.field(name).type
    column = pc.replace_with_mask(table[name].combine_chunks(), pa.array(mask), values.cast(kind))
    return table.set_column(table.schema.get_field_index(name), name, column)


def _figures(balanced: Balanced) -> dict[str, Any]:
    sizes = balanced.cluster_count[balanced.cluster_count > 0]
    kept = balanced.kept
    duplicate = balanced.keeper >= 0
    has = balanced.cluster >= 0
    return {
        "clusters": len(balanced.cluster_count),
        "empty clusters": int((balanced.cluster_count == 0).sum()),
        "largest cluster": int(sizes.max()),
        "median cluster": int(np.median(sizes)),
        "mean center similarity": round(float(balanced.center_similarity[has].mean()), 4),
        "outliers": int(balanced.outlier.sum()),
        "duplicates by embedding": int((duplicate & ~balanced.by_hash).sum()),
        "duplicates by hash": int(balanced.by_hash.sum()),
        "sum of weights": round(float(balanced.weight.sum()), 2),
        "largest weight": _rounded(balanced.weight[kept].max()) if kept.any() else None,
        "smallest weight": _rounded(balanced.weight[kept].min()) if kept.any() else None,
        "seconds": balanced.seconds,
    }


def _rounded(value: npt.NDArray[np.float64]) -> float:
    return round(float(value), 4)


def _embedded(arguments: argparse.Namespace) -> Path:
    # Only now: transformers takes seconds.
    from data_prep.clip_embed import embed_clips

    target: Path = arguments.save_embeddings or arguments.out.with_name(f"{arguments.out.stem}.embeddings.parquet")
    embed_clips(
        arguments.source,
        arguments.clip,
        target,
        arguments.embed,
        device=arguments.device,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    return target


def _settings(arguments: argparse.Namespace) -> BalanceSettings:
    return BalanceSettings(
        clusters=arguments.clusters,
        iterations=arguments.iterations,
        seed=arguments.seed,
        duplicate_similarity=arguments.duplicate_similarity,
        duplicate_bits=arguments.duplicate_bits,
        min_center_similarity=arguments.min_center_similarity,
        outlier_deviations=arguments.outlier_deviations or None,
        outlier_neighbours=arguments.outlier_neighbours,
        temperature=arguments.temperature,
        max_weight=arguments.max_weight,
        keep_best=tuple(arguments.keep_best.split(",")),
    )


def _parser() -> argparse.ArgumentParser:
    standard = BalanceSettings()
    parser = stage_parser(STAGE, __doc__, workers=False, check=_checked, gpu=lambda arguments: arguments.clip)
    add = parser.add_argument
    add("--embeddings", type=Path, metavar="FILE", help=".npy with .ids.txt, or .parquet")
    add("--on-missing", choices=["error", "drop"], default="error", help="clips without an embedding (default error)")
    add("--report", type=Path, metavar="FOLDER", help="for tables and plots (default: OUT.report)")
    model = parser.add_argument_group("instead of --embeddings")
    model.add_argument("--clip", type=Path, metavar="FOLDER", help="CLIP or Chinese CLIP for transformers")
    model.add_argument("--embed", choices=["frames", "caption", "both"], default="frames", help="(default: frames)")
    model.add_argument("--save-embeddings", type=Path, metavar="FILE", help="default: OUT.embeddings.parquet")
    model.add_argument("--device", default="cpu", help="cpu or a GPU, such as cuda:0 (default: %(default)s)")
    model.add_argument("--batch-size", type=int, default=8, metavar="N", help="clips a pass (default: %(default)s)")
    model.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="threads that decode video")
    _add_numbers(parser.add_argument_group("what is found and kept"), standard)
    best = "columns that tell the better of two duplicates, the first decides; -NAME = less (default: %(default)s)"
    add("--keep-best", default=",".join(standard.keep_best), metavar="NAME,...", help=best)
    return parser


def _add_numbers(group: Any, standard: BalanceSettings) -> None:
    for name, kind, default, meaning in (
        ("clusters", int, None, "default: square root of the number of clips"),
        ("iterations", int, standard.iterations, "of K-means"),
        ("seed", int, standard.seed, "of K-means"),
        ("duplicate-similarity", float, standard.duplicate_similarity, "smallest cosine of duplicates; above 1 = off"),
        ("duplicate-bits", int, standard.duplicate_bits, "bits in which duplicates' hashes may differ; -1 = off"),
        ("min-center-similarity", float, None, "a clip whose cosine with its centre is below is far"),
        ("outlier-deviations", float, standard.outlier_deviations, "so far below its cluster's median too; 0 = off"),
        ("outlier-neighbours", int, standard.outlier_neighbours, "other far clips like it make it no outlier; 0 = off"),
        ("temperature", float, standard.temperature, "of the weights; 1 = no change of frequencies"),
        ("max-weight", float, standard.max_weight, "largest sampling weight"),
    ):
        text = meaning if default is None else f"{meaning} (default: %(default)s)"
        group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)


def _checked(arguments: argparse.Namespace) -> None:
    for name in _settings(arguments).keep_best:
        _refuse_unless_number(name.removeprefix("-"))
    if (arguments.embeddings is None) == (arguments.clip is None):
        raise UserError("--embeddings FILE or --clip FOLDER is needed, and not both")
    if arguments.batch_size < 1 or arguments.workers < 1:
        raise UserError(f"--batch-size {arguments.batch_size} and --workers {arguments.workers} must be at least 1")


def _refuse_unless_number(name: str) -> None:
    numbers = [field.name for field in SCHEMA if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)]
    if name not in (*_DERIVED, *numbers):
        raise UserError(f"--keep-best {name}: a number is needed, one of {', '.join((*_DERIVED, *numbers))}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
