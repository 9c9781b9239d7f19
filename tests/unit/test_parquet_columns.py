"""Columns of a Parquet file replaced without decoding the others, as Arrow and DuckDB read the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.parquet_columns import replace_columns
from data_prep.thrift_compact import Field, Reader, encode_struct

PATCH = pa.schema([("why", pa.string()), ("level", pa.int32())])


def table_of(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    gaps = rng.random(rows) < 0.3
    return pa.table(
        {
            "name": pa.array([f"clip {number} \u4e2d" for number in rows * rng.random(rows)], mask=gaps),
            "why": pa.array(["old"] * rows, mask=~gaps),
            "blur": pa.array(rng.random(rows).astype(np.float32), mask=gaps),
            "image": rng.random(rows) < 0.5,
            "empty": pa.nulls(rows),
            "frames": rng.integers(-9, 1 << 40, rows),
        }
    )


def patch_of(rows: int) -> pa.Table:
    whys = pa.array([None if number % 3 else f"rule {number % 7}" for number in range(rows)], pa.string())
    return pa.table({"why": whys, "level": pa.array(range(rows), pa.int32())})


def pieces(table: pa.Table, rows: int) -> list[pa.Table]:
    return [table.slice(start, rows) for start in range(0, table.num_rows, rows)]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 200),
    st.integers(1, 90),
    st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["zstd", "snappy", "none"]),
            "use_dictionary": st.booleans(),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
            "write_page_index": st.booleans(),
            "write_page_checksum": st.booleans(),
            "store_schema": st.booleans(),
        }
    ),
)
def test_new_columns_are_read_and_all_others_are_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, options: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("patched")
    table, patch = table_of(rows), patch_of(rows)
    pq.write_table(table, folder / "old.parquet", row_group_size=group, **options)
    replace_columns(folder / "old.parquet", folder / "new.parquet", PATCH, pieces(patch, group // 2 + 1), {"k": "v"})
    found = pq.read_table(folder / "new.parquet", page_checksum_verification=options["write_page_checksum"])
    assert found.column_names == [*table.column_names, "level"]
    assert found.schema.metadata == {b"k": b"v"}
    expected = table.set_column(1, "why", patch["why"]).append_column("level", patch["level"])
    assert found.replace_schema_metadata(None).equals(expected)


def test_files_of_other_writers(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="a second writer; in the extra `dev`")
    clips, patch = table_of(5000).drop(["empty"]), patch_of(5000)
    form = "(format parquet, compression zstd, row_group_size 2048)"
    duckdb.sql(f"copy (select * from clips) to '{tmp_path}/old.parquet' {form}")
    replace_columns(tmp_path / "old.parquet", tmp_path / "new.parquet", PATCH, pieces(patch, 999), {})
    found = pq.read_table(tmp_path / "new.parquet")
    assert found["why"].equals(patch["why"])
    assert all(found[name].equals(clips[name]) for name in clips.column_names if name != "why")
    # Read by its own reader too, which goes by the statistics of row groups.
    asked = f"select sum(frames), count(why), count(*) filter (level >= 100) from '{tmp_path}/new.parquet'"
    counts = (sum(clips["frames"].to_pylist()), patch["why"].drop_null().length(), 4900)
    assert duckdb.sql(asked).fetchall() == [counts]


def test_more_or_fewer_rows_are_refused(tmp_path: Path) -> None:
    pq.write_table(table_of(10), tmp_path / "old.parquet", row_group_size=5)
    for sizes in ([5, 4], [9], [], [5, 5, 1], [11]):
        with pytest.raises(ValueError, match=r"more rows|rows before"):
            replace_columns(tmp_path / "old.parquet", tmp_path / "new.parquet", PATCH, map(patch_of, sizes), {})


def test_a_footer_is_written_as_it_was_read(tmp_path: Path) -> None:
    pq.write_table(table_of(300), tmp_path / "a.parquet", row_group_size=7, write_page_index=True)
    content = (tmp_path / "a.parquet").read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") : -8]
    assert encode_struct(Reader(footer).struct()) == footer


def test_values_of_every_type_come_back() -> None:
    fields = {
        1: Field(1, None),
        2: Field(2, None),
        3: Field(3, b"\xff"),
        7: Field(7, bytes(8)),
        90: Field(8, b"x" * 300),
    }
    numbers = {4: Field(4, -3), 5: Field(5, 1 << 30), 6: Field(6, -(1 << 63)), 9: Field(6, (1 << 63) - 1)}
    lists = {10: Field(9, (6, list(range(-20, 20)))), 11: Field(10, (12, [fields, {}])), 12: Field(9, (3, []))}
    whole = {**fields, **numbers, **lists, 40: Field(12, {200: Field(12, {})})}
    assert Reader(b"--" + encode_struct(whole), 2).struct() == whole
    with pytest.raises(ValueError, match="type 11"):
        Reader(bytes([0x1B])).struct()
