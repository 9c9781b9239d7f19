"""The manifest: rows survive the round trip; other versions, columns and files are refused by name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_video.errors import UserError
from megatron_video.manifest import (
    SCHEMA,
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
