"""Embeddings of clips by a local CLIP model, as a Parquet file that balance and other tools read.

A clip's vector is the mean of the unit vectors of its frames, or its caption's, or the mean of both; of length 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.caption_config import clip_frames
from data_prep.devices import find_device
from data_prep.model_tags.clip import ClipEncoder, clip_encoder, clip_files
from data_prep.parts import Parts, clear_parts, output_lock
from data_prep.stage import fingerprint_of
from data_prep.workers import progress
from megatron_video.errors import UserError
from megatron_video.files import appearing, file_sha256
from megatron_video.fingerprint import fingerprint_files
from megatron_video.manifest import Row, read_manifest
from megatron_video.video_io import VideoError

NUM_FRAMES = 8
# Twice what CLIP sees, so that its own preprocessing still decides how it is shrunk.
LONG_SIDE = 768
Embedded = Literal["frames", "caption", "both"]
PART_CLIPS = 1024
_FINGERPRINT_KEY = b"megatron_video.embeddings"
_SCHEMA = pa.schema([("clip_id", pa.string()), ("embedding", pa.list_(pa.float32()))])
_COLUMNS = ("clip_id", "source", "caption", "is_image", "start_frame", "end_frame", "width", "height", "dropped_by")
_BOX = ("border_share", "crop_x", "crop_y", "crop_width", "crop_height")


def embed_clips(
    manifest: Path,
    folder: Path,
    target: Path,
    what: Embedded,
    device: str = "cpu",
    batch_size: int = 8,
    workers: int = 1,
) -> None:
    """Write clip_id and embedding (null where a clip cannot be read) of all kept rows to `target`.

    Finished parts lie beside it until it is complete, and the same command goes on from them.

    Args:
        folder: CLIP or Chinese CLIP for transformers.
        workers: threads that decode.

    Raises:
        UserError: no model or device there, another run writes `target`, or a file there was made by something else.
    """
    if not folder.is_dir():
        raise UserError(f"--clip {folder}: no such folder; nothing is downloaded")
    settings = {"what": what, "model": fingerprint_files(clip_files(folder)), "frames": NUM_FRAMES}
    fingerprint = fingerprint_of("embed", settings, file_sha256(manifest))
    with output_lock(target):
        if _is_made(target, fingerprint):
            return
        encoder = clip_encoder(folder, find_device(device), torch.float32)
        table = read_manifest(manifest).select([*_COLUMNS, *_BOX])
        kept = table.filter(table["dropped_by"].is_null())
        parts = _VectorParts(target, fingerprint, kept.num_rows, PART_CLIPS, shard=None)
        clear_parts(target, keep=parts.folder)
        missing = parts.missing()
        with ThreadPoolExecutor(max(workers, 1)) as threads:
            for number in progress(missing, len(missing), "embed", unit="part"):
                numbers = parts.items_of(number)
                rows = kept.slice(numbers.start, len(numbers)).to_pylist()
                parts.write_vectors(number, rows, list(_embed(rows, encoder, what, batch_size, threads)))
        parts.join(target, fingerprint)
        clear_parts(target)


class _VectorParts(Parts):
    """Parts of a table of vectors instead of a manifest."""

    def write_vectors(self, number: int, rows: Sequence[Row], vectors: Sequence[list[float] | None]) -> None:
        """Keep a finished part."""
        columns = {"clip_id": [row["clip_id"] for row in rows], "embedding": vectors}
        with appearing(self._path(number)) as temporary:
            pq.write_table(pa.table(columns, schema=_SCHEMA), temporary)

    def join(self, target: Path, fingerprint: str) -> None:
        """Write all parts to `target`."""
        schema = _SCHEMA.with_metadata({_FINGERPRINT_KEY: fingerprint.encode()})
        # Part by part: all vectors together may be larger than memory.
        with appearing(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for number in range(len(self)):
                writer.write_table(pq.read_table(self._path(number)).cast(schema))


def _embed(
    rows: Sequence[Row], encoder: ClipEncoder, what: Embedded, batch_size: int, threads: ThreadPoolExecutor
) -> Iterator[list[float] | None]:
    # One batch is decoded while the one before it is in the model.
    coming = [threads.submit(_pictures, row) for row in rows[:batch_size]] if what != "caption" else []
    for start in range(0, len(rows), batch_size):
        batch, ready = rows[start : start + batch_size], coming
        following = rows[start + batch_size : start + 2 * batch_size]
        coming = [threads.submit(_pictures, row) for row in following] if what != "caption" else []
        pictures = [future.result() for future in ready]
        vectors = [_of_frames(frames, encoder) for frames in pictures] if ready else [None] * len(batch)
        if what != "frames":
            vectors = [_joined(v, t, what) for v, t in zip(vectors, _of_captions(batch, encoder), strict=True)]
        yield from (None if vector is None else vector.tolist() for vector in vectors)


def _pictures(row: Row) -> np.ndarray | None:
    try:
        return clip_frames(row, NUM_FRAMES, LONG_SIDE)
    except VideoError:
        return None


def _of_frames(frames: np.ndarray | None, encoder: ClipEncoder) -> Tensor | None:
    return None if frames is None else F.normalize(encoder.embed_images(list(frames)).mean(dim=0), dim=0)


def _of_captions(rows: Sequence[Row], encoder: ClipEncoder) -> list[Tensor | None]:
    texts = [row["caption"] or "" for row in rows]
    vectors = encoder.embed_texts(texts)
    return [vector if text else None for vector, text in zip(vectors, texts, strict=True)]


def _joined(frames: Tensor | None, text: Tensor | None, what: Embedded) -> Tensor | None:
    if what == "caption":
        return text
    return None if frames is None or text is None else F.normalize(frames + text, dim=0)


def _is_made(target: Path, fingerprint: str) -> bool:
    if not target.exists():
        return False
    try:
        found = (pq.read_schema(target).metadata or {}).get(_FINGERPRINT_KEY)
    except (pa.ArrowInvalid, OSError):
        found = None
    if found is None:
        raise UserError(f"--save-embeddings {target} would overwrite a file that this command did not write")
    return bool(found.decode() == fingerprint)
