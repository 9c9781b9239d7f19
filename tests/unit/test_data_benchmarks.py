"""The benchmarks of the data stages run, at sizes that say nothing about speed, and compare equal work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decode_bench
import encode_memory_bench
import pytest
import segment_bench
import shard_write_bench


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert content["environment"]["commit"]
    return content


def test_decoders_give_the_same_frames_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    decode_bench.main(["--size", "96", "160", "--bucket", "17x64x96", "--first", "0", "70", "--codecs", "h264",
                       "--repeats", "1", "--decoders", "ours", "pyav", "decord", "--out", str(file)])  # fmt: skip
    rows = read(file)["rows"]
    assert [(row["first"], row["decoder"]) for row in rows] == [
        (first, name) for first in (0, 70) for name in ("ours", "pyav", "decord")
    ]
    done = [row for row in rows if row["status"] == "ok"]
    assert {row["decoder"] for row in done} >= {"ours", "pyav"}
    assert all(row["same_frames"] and row["difference"] < 3 and row["frames_per_cpu_s"] > 0 for row in done)
    assert all("decord" in row["status"] for row in rows if row not in done)


def test_both_shard_writers_write_the_same_members(tmp_path: Path) -> None:
    file = tmp_path / "shards.json"
    sizes = "--bucket 17x32x48 --samples 3 --per-shard 2 --llm-width 16 --channels 8 --repeats 1"
    shard_write_bench.main([*sizes.split(), "--folder", str(tmp_path), "--out", str(file)])
    rows = read(file)["rows"]
    assert {(row["writer"], row["synced"]) for row in rows} == {
        (writer, synced) for writer in ("ours", "webdataset") for synced in (False, True)
    }
    assert all(row["same_content"] and row["mb_per_s"] > 0 for row in rows)
    # Its own scratch folder is gone.
    assert list(tmp_path.iterdir()) == [file]


def test_segment_finds_the_cuts_that_scenedetect_finds(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    file = tmp_path / "segment.json"
    segment_bench.main(["--frames", "50", "--scene-frames", "20", "--size", "72", "96", "--codecs", "h264",
                        "--repeats", "1", "--ways", "ours", "scenedetect", "--out", str(file)])  # fmt: skip
    content = read(file)
    assert content["summary"]["same_cuts"]
    assert [list(row["scenes"].values()) for row in content["rows"]] == [[[0, 20, 40]]] * 2


@pytest.mark.heavy
def test_encode_time_adds_up_and_memory_is_that_of_the_child(tmp_path: Path) -> None:
    file = tmp_path / "encode.json"
    encode_memory_bench.main(["--lengths", "17", "--size", "32", "48", "--time-bucket", "17x32x48", "--clips", "2",
                              "--time-size", "64", "96", "--out", str(file)])  # fmt: skip
    content = read(file)
    (row,) = content["rows"]
    assert 100 < row["peak_mib"] < 4000
    parts = {part["part"]: part["share"] for part in content["summary"]["time"]}
    assert sum(parts[name] for name in ("decode", "vae", "text", "write", "other")) == pytest.approx(1)
    assert 0 < parts["other"] < 1
    assert min(parts["vae"], parts["decode thread"]) > 0
