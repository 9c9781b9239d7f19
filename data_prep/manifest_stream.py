"""Manifests that are larger than memory: read piece by piece, with reading ahead on a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_video.manifest import SCHEMA, complete_columns, read_schema

PIECE_ROWS = 131_072


def iter_manifest(path: Path, columns: Sequence[str] | None = None, rows: int = PIECE_ROWS) -> Iterator[pa.Table]:
    """Pieces of a manifest in order, with the columns of today; memory does not grow with the file.

    Raises:
        UserError: no such file, or no manifest.
    """
    present = read_schema(path).names
    wanted = list(SCHEMA.names) if columns is None else list(columns)
    # Without pre-buffering, which would hold all that was read of the file until its end.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        batches = file.iter_batches(rows, columns=[name for name in wanted if name in present])
        yield from _ahead(complete_columns(pa.Table.from_batches([batch]), wanted) for batch in batches)


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    # Arrow lets go of the interpreter while it decodes, so reading and judging or writing go on at once.
    with ThreadPoolExecutor(1) as thread:
        coming: Future[pa.Table | None] = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table
