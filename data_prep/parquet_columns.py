"""New values for a few columns of a Parquet file; the pages of all other columns are copied as they are.

A Parquet file is column chunks and a footer that says where each of them lies (github.com/apache/parquet-format). What
a stage does not change needs no decoding, compressing and writing anew, which is nearly all the time that a stage of
few columns takes; Arrow has no call for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.thrift_compact import BINARY, I64, LIST, STRUCT, Field, Reader, Struct, encode_struct

_MAGIC = b"PAR1"
# Numbers of fields in parquet.thrift.
_SCHEMA, _ROW_GROUPS, _KEY_VALUES, _COLUMN_ORDERS = 2, 4, 5, 7  # of FileMetaData
_NAME = 4  # of SchemaElement
_NUM_CHILDREN = 5
_COLUMNS, _BYTES, _NUM_ROWS, _FILE_OFFSET, _COMPRESSED_BYTES = 1, 2, 3, 5, 6  # of RowGroup
_CHUNK_OFFSET, _CHUNK_METADATA = 2, 3  # of ColumnChunk
_PATH, _CHUNK_BYTES, _CHUNK_COMPRESSED_BYTES, _DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE = 3, 6, 7, 9, 10, 11
_OFFSETS = (_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE)  # of ColumnMetaData
_BLOOM_FILTER = (14, 15)


def replace_columns(
    source: Path, target: Path, schema: pa.Schema, tables: Iterable[pa.Table], metadata: Mapping[str, str]
) -> None:
    """Write `source` to `target` with new values in the columns of `schema`; ones that it does not have are added.

    Args:
        schema: of the new columns; flat, as the file must be.
        tables: the new columns of all rows of `source`, in order and in pieces of any size.
        metadata: in place of the file's own.

    Raises:
        ValueError: the tables have more or fewer rows than the file.
    """
    with open(source, "rb") as old, open(target, "wb") as new:
        footer = _read_footer(old)
        new.write(_MAGIC)
        groups = _structs(footer, _ROW_GROUPS)
        cut = _cut(iter(tables), [group[_NUM_ROWS].value for group in groups], schema)
        for group, table in zip(groups, cut, strict=True):
            _write_group(new, group, old, _encoded(table.cast(schema)))
        _name_columns(footer, _read_footer(_encoded(schema.empty_table())))
        pairs = [{1: Field(BINARY, key.encode()), 2: Field(BINARY, value.encode())} for key, value in metadata.items()]
        footer[_KEY_VALUES] = Field(LIST, (STRUCT, pairs))
        content = encode_struct(footer)
        new.write(content + len(content).to_bytes(4, "little") + _MAGIC)


def _cut(tables: Iterator[pa.Table], sizes: Sequence[int], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of these sizes; nothing is copied."""
    # A file without rows has a row group of none, and there may be no table for it.
    held = schema.empty_table()
    for size in sizes:
        while held.num_rows < size and (table := next(tables, None)) is not None:
            held = pa.concat_tables([held, table])
        if held.num_rows < size:
            raise ValueError(f"the new columns end {size - held.num_rows} rows before a row group of {size} does")
        yield held.slice(0, size)
        held = held.slice(size)
    # The last piece may be empty, and must be asked for all the same: it ends what makes the pieces.
    if held.num_rows + sum(table.num_rows for table in tables):
        raise ValueError("the new columns have more rows than the file")


def _read_footer(file: IO[bytes]) -> Struct:
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, io.SEEK_END)
    return Reader(file.read(length)).struct()


def _encoded(table: pa.Table) -> IO[bytes]:
    """The table as a Parquet file of one row group, in memory."""
    file = io.BytesIO()
    # Reasons and subsets repeat, so dictionaries pay.
    pq.write_table(table, file, compression="zstd", row_group_size=max(table.num_rows, 1), store_schema=False)
    return file


def _write_group(new: IO[bytes], group: Struct, old: IO[bytes], patch: IO[bytes]) -> None:
    (patched,) = _structs(_read_footer(patch), _ROW_GROUPS)
    chunks = {_name_of(chunk): (chunk, old) for chunk in _structs(group, _COLUMNS)}
    chunks |= {_name_of(chunk): (chunk, patch) for chunk in _structs(patched, _COLUMNS)}
    group[_FILE_OFFSET] = Field(I64, new.tell())
    moved = [_copy_chunk(new, *chunk) for chunk in chunks.values()]
    group[_COLUMNS] = Field(LIST, (STRUCT, moved))
    for total, part in ((_BYTES, _CHUNK_BYTES), (_COMPRESSED_BYTES, _CHUNK_COMPRESSED_BYTES)):
        group[total] = Field(I64, sum(chunk[_CHUNK_METADATA].value[part].value for chunk in moved))


def _copy_chunk(new: IO[bytes], chunk: Struct, file: IO[bytes]) -> Struct:
    told: Struct = chunk[_CHUNK_METADATA].value
    # Dictionary pages come first; where there is none, or no page at all as in an empty file, writers may say 0.
    start = min((told[number].value for number in _OFFSETS if number in told and told[number].value), default=0)
    shift = new.tell() - start
    file.seek(start)
    new.write(file.read(told[_CHUNK_COMPRESSED_BYTES].value))
    moved = {number: field for number, field in told.items() if number not in _BLOOM_FILTER}
    for number in _OFFSETS:
        if number in moved and moved[number].value:
            moved[number] = Field(I64, moved[number].value + shift)
    # Page indexes and Bloom filters lie elsewhere in the file, and stay behind.
    return {_CHUNK_OFFSET: Field(I64, 0), _CHUNK_METADATA: Field(STRUCT, moved)}


def _name_columns(footer: Struct, patch: Struct) -> None:
    """Describe the new columns as `patch` does: their pages were written by it."""
    root, *described = _structs(footer, _SCHEMA)
    columns = {column[_NAME].value: column for column in described}
    columns |= {column[_NAME].value: column for column in _structs(patch, _SCHEMA)[1:]}
    root = {**root, _NUM_CHILDREN: root[_NUM_CHILDREN]._replace(value=len(columns))}
    footer[_SCHEMA] = Field(LIST, (STRUCT, [root, *columns.values()]))
    if _COLUMN_ORDERS in footer:
        orders = _structs(footer, _COLUMN_ORDERS)
        added = _structs(patch, _COLUMN_ORDERS)[:1] * (len(columns) - len(orders))
        footer[_COLUMN_ORDERS] = Field(LIST, (STRUCT, orders + added))


def _name_of(chunk: Struct) -> bytes:
    _, (name,) = chunk[_CHUNK_METADATA].value[_PATH].value
    column: bytes = name
    return column


def _structs(struct: Struct, number: int) -> list[Any]:
    found: list[Any] = struct[number].value[1]
    return found
