"""The manifest: a Parquet table with one row a clip, written stage by stage.

A clip is a span of frames of a source file; nothing is re-encoded. A dropped clip keeps its row, with the stage that
dropped it and the reason. The columns are the tables below: a stage fills its own, later ones stay null until then.
Columns that came after version 1 may be missing in a file; they are read as nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_video.errors import UserError
from megatron_video.files import appearing

MANIFEST_VERSION = 2
VERSION_KEY = "megatron_video.manifest_version"

# name, Arrow type, stage that fills it, meaning
_Columns = tuple[tuple[str, pa.DataType, str, str], ...]
# Every manifest has these.
VERSION_1_COLUMNS: _Columns = (
    (
        "clip_id",
        pa.string(),
        "ingest",
        "content hash + frame span; unique among kept rows; key in the shards",
    ),
    ("source", pa.string(), "ingest", "absolute path of the file"),
    ("content_hash", pa.string(), "ingest", "BLAKE2b-96 of the file's bytes, hex"),
    ("caption", pa.string(), "ingest", "the text that belongs to the clip"),
    ("language", pa.string(), "ingest", "'en', 'zh' or 'und' (no letters of either)"),
    ("is_image", pa.bool_(), "ingest", "a still picture: one frame, no times"),
    ("codec", pa.string(), "ingest", "libav decoder name"),
    ("pixel_format", pa.string(), "ingest", "libav pixel format name"),
    ("rotation", pa.int32(), "ingest", "degrees counter-clockwise that a viewer applies; readers apply it too"),
    ("width", pa.int32(), "ingest", "pixels, upright picture"),
    ("height", pa.int32(), "ingest", "pixels, upright picture"),
    ("fps", pa.float64(), "ingest", "average frames per second; 0 for an image"),
    ("start_frame", pa.int64(), "ingest, segment", "first frame of the span"),
    ("end_frame", pa.int64(), "ingest, segment", "frame after the last one"),
    ("start_time", pa.float64(), "ingest, segment", "seconds"),
    ("end_time", pa.float64(), "ingest, segment", "seconds"),
    ("crop_x", pa.int32(), "tag", "left edge of the picture inside black borders, pixels"),
    ("crop_y", pa.int32(), "tag", "top edge"),
    ("crop_width", pa.int32(), "tag", "width inside black borders"),
    ("crop_height", pa.int32(), "tag", "height inside black borders"),
    ("border_share", pa.float32(), "tag", "share of the picture that is black border, 0 to 1"),
    ("blur", pa.float32(), "tag", "variance of the Laplacian of grey values (0-255), mean of 8 frames; low = blurred"),
    ("brightness", pa.float32(), "tag", "mean of HSV value, 0 to 255"),
    ("saturation_mean", pa.float32(), "tag", "HSV saturation 0 to 255: mean over 8 frames of each frame's mean"),
    ("saturation_max", pa.float32(), "tag", "largest of the 8"),
    ("saturation_min", pa.float32(), "tag", "smallest of the 8"),
    (
        "motion_mean",
        pa.float32(),
        "tag",
        "Farneback flow, pixels a frame at 256 pixels long side; null for images",
    ),
    ("motion_max", pa.float32(), "tag", "largest of the sampled pairs"),
    ("motion_min", pa.float32(), "tag", "smallest of the sampled pairs"),
    ("bucket", pa.string(), "encode", "frames x height x width of the encoded sample"),
    ("shard", pa.string(), "encode", "file name of the shard"),
    ("dropped_by", pa.string(), "any", "stage that dropped the clip; null = kept"),
    ("drop_reason", pa.string(), "any", "why"),
)
# New columns go here; all of them may be null.
VERSION_2_COLUMNS: _Columns = (
    ("origin", pa.string(), "ingest", "TAR::MEMBER, or FILE::START-END of a re-encoded clip, that it was made of"),
    ("title", pa.string(), "ingest", "original title, from the listing or the file's own metadata"),
    ("duration", pa.float64(), "ingest", "seconds of the whole file, by its frames' times; 0 for an image"),
    ("variable_fps", pa.bool_(), "ingest", "the times between frames differ by more than the container's rounding"),
    ("audio", pa.bool_(), "ingest", "there is a sound track"),
    ("color_transfer", pa.string(), "ingest", "transfer characteristics, libav's name, such as bt709 or smpte2084"),
    ("hdr", pa.bool_(), "ingest", "transfer characteristics are PQ (smpte2084) or HLG (arib-std-b67)"),
    ("short_side", pa.int32(), "tag", "min(crop_width, crop_height), pixels: the resolution that is left"),
    (
        "flicker",
        pa.float32(),
        "tag",
        "mean over the sampled frames n of |Y(n+1) - Y(n)|, Y = mean grey of a frame, 0 to 255; null for images",
    ),
    (
        "static_share",
        pa.float32(),
        "tag",
        "share of pixels whose grey value, at 256 pixels long side, keeps within 8 of 255 over the sampled frames "
        "(largest - smallest <= 8), 0 to 1; null for images",
    ),
    (
        "text_area",
        pa.float32(),
        "tag",
        "share of the picture in rows of letter-like edges that stay in place in half of the sampled frames, 0 to 1; "
        "no model: also finds other rows of small strokes",
    ),
    ("phash", pa.string(), "tag", "64-bit DCT hash (ImageHash) of the middle sampled frame inside its borders, hex"),
    ("aesthetic", pa.float32(), "tag", "CLIP + MLP head, mean of 8 frames"),
    ("nsfw", pa.float32(), "tag", "CLIP + head, largest of 8 frames; 0 to 1 (ViT-H/14 head: about)"),
    ("watermark", pa.float32(), "tag", "probability, mean of 8 frames, 0 to 1"),
    ("ocr_area", pa.float32(), "tag", "share of the picture under text that OCR reads, mean of 8 frames, 0 to 1"),
    ("text_video_score", pa.float32(), "tag", "cosine of caption and frame in CLIP's space, mean of 8 frames"),
    ("tag_models", pa.string(), "tag", "JSON: model tag -> hash of the model files that scored it"),
    ("subset", pa.string(), "filter", "strictest subset that the clip is in, and so in all wider ones; null = none"),
    ("subset_reason", pa.string(), "filter", "why it is not in the next stricter subset"),
    ("caption_short", pa.string(), "caption", "one sentence"),
    ("caption_dense", pa.string(), "caption", "subject, events, scene, style, camera"),
    ("caption_title", pa.string(), "caption", "the original title, cleaned"),
    ("caption_model", pa.string(), "caption", "model, endpoint or file that wrote the captions, and its prompts"),
    ("caption_kind", pa.string(), "caption", "which of the three became `caption`; null = the one it came with"),
    ("cluster", pa.int32(), "balance", "number of the K-means cluster"),
    ("cluster_count", pa.int64(), "balance", "clips in that cluster (the paper's Cluster_Cnt)"),
    ("center_similarity", pa.float32(), "balance", "cosine with the cluster's centre (the paper's Center_Sim)"),
    ("weight", pa.float32(), "balance", "resampling weight"),
    ("duplicate_of", pa.string(), "balance", "clip_id of the kept near-duplicate"),
)
COLUMNS: _Columns = VERSION_1_COLUMNS + VERSION_2_COLUMNS
SCHEMA = pa.schema([(name, kind) for name, kind, _, _ in COLUMNS], metadata={VERSION_KEY: str(MANIFEST_VERSION)})

Row = dict[str, Any]


def read_manifest(path: str | Path) -> pa.Table:
    """Read a manifest and check that it is one; columns that it is too old for come as nulls.

    Raises:
        UserError: no such file, not Parquet, no manifest, of a newer version, or with wrong columns.
    """
    read_schema(path)
    return complete_columns(_parquet(path, pq.read_table))


def read_schema(path: str | Path) -> pa.Schema:
    """Columns and metadata of a manifest, as they stand in the file, after the checks of `read_manifest`.

    Raises:
        UserError: as `read_manifest`.
    """
    schema: pa.Schema = _parquet(path, pq.read_schema)
    _check_version(path, schema)
    _check_columns(path, schema)
    return schema


def complete_columns(table: pa.Table, names: Sequence[str] = SCHEMA.names) -> pa.Table:
    """The table with the named columns of today, in their types; ones that came after its version are null."""
    for name in names:
        if name not in table.schema.names:
            table = table.append_column(SCHEMA.field(name), pa.nulls(table.num_rows, SCHEMA.field(name).type))
    # The cast turns columns of nulls, which Arrow infers where nothing is filled yet, into the schema's types.
    schema = pa.schema([SCHEMA.field(name) for name in names], metadata=table.schema.metadata)
    return table.select(list(names)).cast(schema)


def write_manifest(table: pa.Table, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a table that has the manifest's columns, under a temporary name first.

    `metadata` is kept in the file's schema (stages store there what they were run with).
    """
    _check_columns(path, table.schema)
    extra = {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    table = complete_columns(table).replace_schema_metadata({**(SCHEMA.metadata or {}), **extra})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def table_from_rows(rows: Iterable[Row]) -> pa.Table:
    """Rows as a table with the manifest's columns; fields that a row does not have become null.

    Raises:
        ValueError: a row has a field that is no column.
    """
    rows = list(rows)
    # Arrow would leave unknown fields out without a word.
    unknown = {name for row in rows for name in row} - set(SCHEMA.names)
    if unknown:
        raise ValueError(f"no columns of the manifest: {sorted(unknown)}")
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def dropped(row: Row, stage: str, reason: str) -> Row:
    """The row, marked as dropped by `stage` for `reason`. A row stays dropped by the first stage that did it."""
    if row.get("dropped_by"):
        return row
    return {**row, "dropped_by": stage, "drop_reason": reason}


def kept_rows(table: pa.Table) -> list[Row]:
    """The rows that no stage dropped, in order."""
    rows: list[Row] = table.filter(table["dropped_by"].is_null()).to_pylist()
    return rows


def clip_id(content_hash: str, start_frame: int, end_frame: int) -> str:
    """Identity of a clip: what is in the file, and which frames. No dots: webdataset splits names at the first."""
    return f"{content_hash}-{start_frame:06d}-{end_frame:06d}"


def _parquet(path: str | Path, read: Callable[[str | Path], Any]) -> Any:
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, no manifest; `megatron-video data ingest` makes one of it")
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; `megatron-video data ingest` writes the first one") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not readable as Parquet: {error}") from None


def _check_version(path: str | Path, schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(VERSION_KEY.encode())
    if version is None:
        raise UserError(f"{path} is a Parquet file but no manifest; `megatron-video data ingest` writes manifests")
    if int(version) > MANIFEST_VERSION:
        raise UserError(
            f"{path} has manifest version {int(version)}, this program knows up to {MANIFEST_VERSION}; update it"
        )


def _check_columns(path: str | Path, schema: pa.Schema) -> None:
    missing = [name for name, *_ in VERSION_1_COLUMNS if name not in schema.names]
    unknown = [name for name in schema.names if name not in SCHEMA.names]
    wrong = [name for name in schema.names if name not in unknown and not _same_type(schema, name)]
    if missing or unknown or wrong:
        raise UserError(
            f"{path}: wrong manifest columns: missing {missing}, unknown {unknown}, of another type {wrong}; "
            "the tables in megatron_video/manifest.py say what there is"
        )


def _same_type(schema: pa.Schema, name: str) -> bool:
    # A stage that fills nothing in a column may leave it untyped.
    return schema.field(name).type in (SCHEMA.field(name).type, pa.null())
