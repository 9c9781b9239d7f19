"""One vector a clip, from a file that may be larger than memory: aligned with the manifest, read in blocks.

Two forms: NAME.npy, [N, D] of any float type, with one clip_id a line in NAME.ids.txt; or a Parquet file with columns
`clip_id` and `embedding` (a list of D floats). Vectors are scaled to length 1 when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_video.errors import UserError
from megatron_video.files import appearing

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
BLOCK_ROWS = 16384
_SHORTEST = 1e-12


@dataclass(frozen=True)
class Vectors:
    """The vectors of `len(place)` clips."""

    data: np.ndarray
    """[N, D] of any float type, memory-mapped."""
    place: Numbers
    """int64 [n]: row of `data` that belongs to each clip; -1 = none."""

    @property
    def width(self) -> int:
        """D."""
        return int(self.data.shape[1])

    def unit(self, clips: Numbers) -> Floats:
        """float32 [len(clips), D] of length 1; only for clips that `usable` names."""
        block = self._raw(clips)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        return block

    def usable(self) -> Numbers:
        """The clips that have a finite vector that is not zero, in order; one pass over the file."""
        good = [block[self._sound(block)] for block in blocks_of(np.flatnonzero(self.place >= 0))]
        return np.concatenate([np.zeros(0, np.int64), *good])

    def _sound(self, clips: Numbers) -> npt.NDArray[np.bool_]:
        lengths = np.linalg.norm(self._raw(clips), axis=1)
        return np.isfinite(lengths) & (lengths > _SHORTEST)

    def _raw(self, clips: Numbers) -> Floats:
        # A copy in memory of this block only; numpy reads the mapped pages that it needs.
        return np.asarray(self.data[self.place[clips]], dtype=np.float32)


def open_vectors(file: Path, clip_ids: pa.ChunkedArray, work: Path) -> Vectors:
    """The vectors of these clips, in their order.

    Args:
        clip_ids: string [n].
        work: folder for a mapped copy of a Parquet file's vectors.

    Raises:
        UserError: no such file, another form, a clip_id twice, or vectors of several lengths.
    """
    if not file.is_file():
        raise UserError(f"--embeddings {file}: no such file")
    if file.suffix == ".npy":
        data, names = _open_array(file)
    elif file.suffix == ".parquet":
        data, names = _open_table(file, work)
    else:
        raise UserError(f"--embeddings {file} must be a .npy or a .parquet file")
    if pc.count_distinct(names).as_py() != len(names):
        raise UserError(f"--embeddings {file}: {len(names)} vectors for {pc.count_distinct(names)} different clip_ids")
    place = pc.fill_null(pc.index_in(clip_ids, value_set=names), -1).to_numpy()
    return Vectors(data, place.astype(np.int64))


def _open_array(file: Path) -> tuple[np.ndarray, pa.Array]:
    listing = file.with_suffix(".ids.txt")
    if not listing.is_file():
        raise UserError(f"--embeddings {file} needs {listing.name} beside it, with one clip_id a line")
    try:
        data = np.load(file, mmap_mode="r")
    except ValueError as error:
        raise UserError(f"--embeddings {file} cannot be read as a NumPy array: {error}") from None
    if data.ndim != 2 or data.dtype.kind != "f":
        raise UserError(f"--embeddings {file} is {data.dtype} {list(data.shape)}, not floats [N, D]")
    ids = pa.array([line for line in listing.read_text(encoding="utf-8").splitlines() if line])
    if len(ids) != len(data):
        raise UserError(f"{listing} has {len(ids)} clip_ids for {len(data)} vectors")
    return data, ids


def _open_table(file: Path, work: Path) -> tuple[np.ndarray, pa.Array]:
    try:
        table = pq.ParquetFile(file)
        missing = {"clip_id", "embedding"} - set(table.schema_arrow.names)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"--embeddings {file} is not readable as Parquet: {error}") from None
    if missing:
        raise UserError(f"--embeddings {file} has no column {', '.join(sorted(missing))}")
    names = table.read(columns=["clip_id"])["clip_id"].cast(pa.string()).combine_chunks()
    copy = work / "vectors.npy"
    if not copy.is_file():
        _map_lists(file, table, copy)
    return np.load(copy, mmap_mode="r"), names


def _map_lists(file: Path, table: pq.ParquetFile, copy: Path) -> None:
    """Write the lists of a Parquet file as one array; a clip without a list gets zeros."""
    width = next((len(value) for value in _values(table) if value is not None), 0)
    if not width:
        raise UserError(f"--embeddings {file}: no clip has an embedding")
    # Written and not mapped: a full disk is then an error, and no bus error that kills the process.
    with appearing(copy) as temporary, open(temporary, "wb") as file_out:
        shape = (table.metadata.num_rows, width)
        np.lib.format.write_array_header_1_0(file_out, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for batch in table.iter_batches(BLOCK_ROWS, columns=["embedding"]):
            file_out.write(_block_of(file, batch["embedding"], width).tobytes())


def _block_of(file: Path, lists: pa.Array, width: int) -> Floats:
    lengths = pc.fill_null(pc.list_value_length(lists), width).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        raise UserError(f"--embeddings {file}: vectors of {width} and of {lengths[lengths != width][0]} numbers")
    block = np.zeros((len(lists), width), np.float32)
    full = lists.is_valid().to_numpy(zero_copy_only=False)
    block[full] = lists.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return block


def _values(table: pq.ParquetFile) -> Iterator[list[float] | None]:
    for batch in table.iter_batches(64, columns=["embedding"]):
        yield from batch["embedding"].to_pylist()


def blocks_of(numbers: Numbers) -> Iterator[Numbers]:
    """The numbers in blocks that fit memory with their vectors."""
    for start in range(0, len(numbers), BLOCK_ROWS):
        yield numbers[start : start + BLOCK_ROWS]
