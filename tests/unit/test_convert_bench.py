"""The benchmark of conversions runs, at a size that says nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path

import convert_bench
import pytest


@pytest.mark.heavy  # nine commands, each of which imports torch
def test_convert_bench_times_both_ways_beside_cp(tmp_path: Path) -> None:
    file = tmp_path / "convert.json"
    file.write_text(json.dumps({"other": {}}))
    sizes = ["--layers", "1", "--heads", "2", "--repeats", "1", "--name", "tiny", "--folder", str(tmp_path)]
    convert_bench.main([*sizes, "--out", str(file)])
    content = json.loads(file.read_text())
    assert content.keys() == {"other", "tiny"}
    rows = content["tiny"]["rows"]
    assert [row["way"] for row in rows] == ["cp", "convert --no-verify", "cp and read", "convert"] * 2
    assert {row["direction"] for row in rows} == {"released -> core", "core -> released"}
    ours = [row for row in rows if row["way"].startswith("convert")]
    assert all(row["of_cp"] <= row["work_of_cp"] for row in ours)
    assert all(0.1 < row["anonymous_gb"] <= row["peak_gb"] < 2 for row in ours)
    assert len(content["tiny"]["summary"]["extrapolation"]) == 2
    assert list(tmp_path.iterdir()) == [file]
