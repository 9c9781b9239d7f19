"""The manifest: rows survive the round trip; other versions, columns and files are refused by name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_video.errors import UserError
from megatron_video.manifest import (
    SCHEMA,
    VERSION_1_COLUMNS,
    clip_id,
    dropped,
    kept_rows,
    read_manifest,
    table_from_rows,
    write_manifest,
)


def test_rows_come_back_and_dropped_ones_stay(tmp_path: Path) -> None:
    row = {"clip_id": clip_id("ab12", 3, 20), "source": "/videos/一个.mp4", "caption": "红色圆形", "fps": 24.0}
    lost = dropped(dropped({**row, "clip_id": "x"}, "tag", "first"), "filter", "second")
    write_manifest(table_from_rows([row, lost]), tmp_path / "m.parquet")
    table = read_manifest(tmp_path / "m.parquet")
    assert table.num_rows == 2
    (kept,) = kept_rows(table)
    assert kept["clip_id"] == "ab12-000003-000020"
    assert kept["caption"] == "红色圆形"
    assert kept["motion_mean"] is None
    assert (table["dropped_by"][1].as_py(), table["drop_reason"][1].as_py()) == ("tag", "first")
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(path)
    path.write_text("no parquet")
    with pytest.raises(UserError, match="not readable as Parquet"):
        read_manifest(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(path)


def test_newer_versions_and_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = table_from_rows([{"clip_id": "a"}])
    newer = {key: b"7" for key in SCHEMA.metadata}
    pq.write_table(table.replace_schema_metadata(newer), path)
    with pytest.raises(UserError, match="version 7"):
        read_manifest(path)
    pq.write_table(table.drop_columns(["caption"]).append_column("extra", pa.array([1])), path)
    with pytest.raises(UserError, match=r"missing \['caption'\], unknown \['extra'\]"):
        read_manifest(path)
    number = table.schema.get_field_index("fps")
    pq.write_table(table.set_column(number, "fps", pa.array(["fast"])), path)
    with pytest.raises(UserError, match=r"of another type \['fps'\]"):
        read_manifest(path)
    with pytest.raises(ValueError, match="colour"):
        table_from_rows([{"colour": "red"}])


def test_a_manifest_of_version_1_is_read_with_the_later_columns_null(tmp_path: Path) -> None:
    path = tmp_path / "old.parquet"
    # Built as the first version wrote it: its columns only, its number in the metadata.
    names = [name for name, *_ in VERSION_1_COLUMNS]
    kinds = pa.schema([(name, kind) for name, kind, *_ in VERSION_1_COLUMNS])
    old = pa.Table.from_pylist([{"clip_id": "a", "caption": "text", "fps": 24.0}], schema=kinds)
    pq.write_table(old.replace_schema_metadata({b"megatron_video.manifest_version": b"1", b"mine": b"x"}), path)
    table = read_manifest(path)
    assert table.schema.names == SCHEMA.names
    assert table.schema.metadata[b"mine"] == b"x"
    (row,) = table.to_pylist()
    assert {name: row[name] for name in names} == old.to_pylist()[0]
    assert {row[name] for name in SCHEMA.names if name not in names} == {None}
    write_manifest(table, path)
    assert pq.read_schema(path).metadata[b"megatron_video.manifest_version"] == b"2"
    assert read_manifest(path).equals(table)


def test_columns_come_in_one_order(tmp_path: Path) -> None:
    table = table_from_rows([{"clip_id": "a", "hdr": True}])
    pq.write_table(table.select(sorted(SCHEMA.names)), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").equals(table)
