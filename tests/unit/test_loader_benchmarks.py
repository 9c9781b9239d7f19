"""The benchmarks of index, loader and data wait run, at sizes that say nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path

import data_wait_bench
import index_bench
import loader_bench
import pytest

# Each of their readers is a process that imports torch.
pytestmark = pytest.mark.heavy


def test_index_bench_starts_twice_on_what_it_built(tmp_path: Path) -> None:
    sizes = ["--samples", "5000", "--steps", "2", "--batch", "64", "--folder", str(tmp_path)]
    index_bench.main([*sizes, "--out", str(tmp_path / "index.json")])
    content = json.loads((tmp_path / "index.json").read_text())
    assert [row["what"].split(":")[0] for row in content["rows"]] == ["build (once)", *["first start"] * 2] + [
        "second start"
    ] * 2
    assert content["summary"]["bytes a sample"] > 80


def test_loader_bench_reads_the_same_samples_with_every_reader(tmp_path: Path) -> None:
    sizes = "--bucket 1x48x48 --samples 6 --per-shard 4 --llm-tokens 3 --llm-width 8 --channels 4 --repeats 1"
    loader_bench.main([*sizes.split(), "--folder", str(tmp_path), "--out", str(tmp_path / "loader.json")])
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    readers = [row for row in rows if "reader" in row]
    assert [row["reader"] for row in readers] == ["ours in order", "ours shuffled", "ours unverified", "webdataset"]
    assert all(row["same_samples"] for row in readers)
    assert all(row["repetitions"][0]["samples"] == 6 for row in readers)
    assert {row["part"] for row in rows if "part" in row} == {
        "whole batch",
        "read and decode",
        "noise and posterior draws",
    }


def test_data_wait_bench_measures_the_threads_and_the_workers_loader(tmp_path: Path) -> None:
    sizes = "--workers 0 1 --steps 3 --images 2 --samples 8"
    data_wait_bench.main([*sizes.split(), "--folder", str(tmp_path), "--out", str(tmp_path / "wait.json")])
    rows = json.loads((tmp_path / "wait.json").read_text())["rows"]
    assert [row["workers"] for row in rows] == [0, 1]
    assert all(0 <= row["wait_share"] < 1 and row["cpu_s_a_step"] > 0 for row in rows)
