"""Held-out samples must not be among those trained on: no source video is in both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from megatron_video.shard_schema import INDEX_FILE

# Rows of an index that are in memory at a time.
_ROWS = 1 << 20
_SHOWN = 5


def check_held_out(training: Sequence[str], held_out: Sequence[str], record: Path) -> None:
    """Refuse held-out folders that share a source video with the training folders.

    Keys begin with the hash of their source file, so other clips of one video count as shared too. The indices are
    streamed: a hundred million rows take half a minute of one core and 300 MiB. `record` keeps what was checked, and
    later lives of the run do not read the same indices again.

    Raises:
        UserError: naming sources that are in both.
    """
    checked = _identity([*training, "held out", *held_out])
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == checked:
        return
    wanted = pc.unique(pa.chunked_array(list(_sources(held_out)), type=pa.string()))
    shared: set[str] = set()
    for sources in _sources(training):
        found = sources.filter(pc.is_in(sources, value_set=wanted))
        shared.update(found.unique().to_pylist())
    if shared:
        raise UserError(
            f"validation.shards={list(held_out)}: {len(shared)} of their source videos are in data.shards too (such as "
            f"{sorted(shared)[:_SHOWN]}); make both with `megatron-video data split`, which keeps a video on one side"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(checked, indent=1).encode())


def _sources(folders: Sequence[str]) -> Iterator[pa.Array]:
    """The source of every sample, some rows at a time."""
    for folder in folders:
        with pq.ParquetFile(Path(folder) / INDEX_FILE) as index:
            for batch in index.iter_batches(_ROWS, columns=["key"]):
                # clip_id: source-first-last.
                yield pc.list_element(pc.split_pattern(batch.column(0), "-", max_splits=1), 0)


def _identity(folders: Sequence[str]) -> list[list[str | int]]:
    """Which indices these are, without reading them."""
    identity: list[list[str | int]] = []
    for folder in folders:
        path = Path(folder) / INDEX_FILE
        stat = path.stat() if path.exists() else None
        identity.append([folder, stat.st_size, stat.st_mtime_ns] if stat else [folder])
    return identity
