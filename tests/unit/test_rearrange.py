"""merge, split and reshard: the same samples elsewhere, with the same payloads, and nothing that does not belong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tiny_shards import write_tiny_shards

from data_prep import cli, rearrange, verify
from megatron_video.buckets import parse_bucket
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import read_manifest, table_from_rows, write_manifest
from megatron_video.shard_schema import shard_name
from megatron_video.shards import ShardDataset, ShardWriter, finish_dataset, read_info, write_null_text
from training.data_set import TrainingData

COUNTS = {"17x48x48": 7, "1x48x48": 5}


def write_folder(folder: Path, seed: int = 0, dropped: int = 2) -> Path:
    """Shards with a manifest, as encode leaves them."""
    write_tiny_shards(folder, COUNTS, seed)
    index = ShardDataset(folder).index.to_pylist()
    rows: list[dict[str, Any]] = [
        {"clip_id": r["key"], "source": f"/raw/{r['key']}.mp4", "content_hash": r["key"].split("-")[0]}
        | {"bucket": r["bucket"], "shard": r["shard"], "caption": r["key"]}
        for r in index
    ]
    rows += [
        {"source": f"/raw/bad{seed}{n}.mp4", "dropped_by": "ingest", "drop_reason": "unreadable: x"}
        for n in range(dropped)
    ]
    write_manifest(table_from_rows(rows), folder / "manifest.parquet")
    return folder


def write_clips_of_sources(folder: Path, sources: int, clips: int) -> Path:
    """Every source file has several clips; keys are as ingest and segment make them."""
    template = ShardDataset(write_tiny_shards(folder.parent / "template", {"17x48x48": 1}))
    bucket, rows = parse_bucket("17x48x48"), []
    with ShardWriter(folder, shard_name(0)) as writer:
        for source in range(sources):
            for clip in range(clips):
                key = f"{source:024x}-{clip * 20:06d}-{clip * 20 + 17:06d}"
                writer.add(template[0]._replace(key=key, metadata={"caption": key}), bucket)
                fields = {"clip_id": key, "content_hash": f"{source:024x}", "source": f"/raw/{source}.mp4"}
                rows.append(fields | {"bucket": bucket.name, "shard": shard_name(0)})
    write_null_text(folder, *template.null_text)
    finish_dataset(folder, replace(template.dataset_info, samples=0, buckets={}, shards=[], files={}))
    write_manifest(table_from_rows(rows), folder / "manifest.parquet")
    return folder


def payloads(folder: Path) -> dict[str, dict[str, bytes]]:
    dataset = ShardDataset(folder)
    return {key: dataset.payloads(number) for number, key in enumerate(dataset.index["key"].to_pylist())}


@pytest.mark.parametrize("link", [True, False])
def test_merge_keeps_every_byte_of_the_tars(tmp_path: Path, link: bool) -> None:
    sources = [write_folder(tmp_path / "a", 0), write_folder(tmp_path / "b", 1)]
    report = rearrange.merge(sources, tmp_path / "out", link)
    assert (report.shards, report.folders) == (4, {str(tmp_path / "out"): 24})
    assert payloads(tmp_path / "out") == payloads(sources[0]) | payloads(sources[1])
    assert verify.run(tmp_path / "out").faults == []
    records = [record for source in sources for record in read_info(source).shards]
    for number, record in enumerate(records):
        merged = tmp_path / "out" / shard_name(number)
        source = sources[number // 2] / record["name"]
        assert merged.read_bytes() == source.read_bytes()
        assert (merged.stat().st_ino == source.stat().st_ino) is link
    rows = read_manifest(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert Counter(row["dropped_by"] for row in rows) == {None: 24, "ingest": 4}
    assert rearrange.merge(sources, tmp_path / "out", link).up_to_date
    # What training makes of the folders, together or merged, is the same set of samples.
    together = TrainingData([str(source) for source in sources])
    merged_data = TrainingData([str(tmp_path / "out")])
    assert {together[n].key for n in range(24)} == {merged_data[n].key for n in range(24)}


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a", 0), write_folder(tmp_path / "b", 1)
    with pytest.raises(UserError, match="occurs in"):
        rearrange.merge([first, write_folder(tmp_path / "again", 0)], tmp_path / "out")
    for sources in ([first], [first, first]):
        with pytest.raises(UserError, match="two or more different folders"):
            rearrange.merge(sources, tmp_path / "out")
    info = json.loads((second / "dataset_info.json").read_text()) | {"vae_fingerprint": "other"}
    (second / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"b and .*a were encoded differently \(vae_fingerprint: other and vae\)"):
        rearrange.merge([first, second], tmp_path / "out")
    assert not list(tmp_path.glob("out/*.tar"))


def test_merge_refuses_a_damaged_tar(tmp_path: Path) -> None:
    sources = [write_folder(tmp_path / "a", 0), write_folder(tmp_path / "b", 1)]
    path = sources[1] / shard_name(0)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"b/shard-000000\.tar: checksum differs"):
        rearrange.merge(sources, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_reshard_changes_only_the_shards(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a")
    rearrange.reshard(source, tmp_path / "out", samples_per_shard=3)
    assert payloads(tmp_path / "out") == payloads(source)
    assert verify.run(tmp_path / "out").faults == []
    assert [shard["samples"] for shard in read_info(tmp_path / "out").shards] == [3, 3, 1, 3, 2]
    kept = read_manifest(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert Counter(row["dropped_by"] for row in kept) == {None: 12, "ingest": 2}
    # Back to the old size gives the old tars.
    rearrange.reshard(tmp_path / "out", tmp_path / "back", samples_per_shard=100)
    for record in read_info(source).shards:
        assert (tmp_path / "back" / record["name"]).read_bytes() == (source / record["name"]).read_bytes()


def test_a_shuffle_stays_within_the_bucket_and_can_be_repeated(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a")
    orders = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        rearrange.reshard(source, tmp_path / name, samples_per_shard=4, seed=seed)
        orders.append(ShardDataset(tmp_path / name).index["key"].to_pylist())
        for shard, group in groupby(ShardDataset(tmp_path / name).index.to_pylist(), key=lambda row: row["shard"]):
            assert len({row["bucket"] for row in group}) == 1, shard
        assert payloads(tmp_path / name) == payloads(source)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != ShardDataset(source).index["key"].to_pylist()


def test_a_stopped_reshard_goes_on(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a")
    whole = tmp_path / "whole"
    rearrange.reshard(source, whole, samples_per_shard=3)
    # What a kill leaves: some shards, half of one, no index of the whole.
    part = tmp_path / "part"
    rearrange.reshard(source, part, samples_per_shard=3)
    for name in ("dataset_info.json", "manifest.parquet", "index.parquet", "shard-000002.tar"):
        (part / name).unlink()
    (part / "parts" / "shard-000002.index.parquet").unlink()
    (part / ".shard-000002.tar.1.tmp").write_bytes(b"half")
    before = (part / "shard-000000.tar").stat().st_mtime_ns
    assert not rearrange.reshard(source, part, samples_per_shard=3).up_to_date
    assert (part / "shard-000000.tar").stat().st_mtime_ns == before
    files = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert {p.relative_to(part): p.read_bytes() for p in part.rglob("*") if p.is_file()} == files
    with pytest.raises(UserError, match="other settings"):
        rearrange.reshard(source, part, samples_per_shard=4)


def test_split_keeps_clips_of_one_file_together(tmp_path: Path) -> None:
    source = write_clips_of_sources(tmp_path / "a", sources=60, clips=3)
    report = rearrange.split(source, tmp_path / "out", {"train": 80, "test": 20}, samples_per_shard=50)
    train, test = payloads(tmp_path / "out" / "train"), payloads(tmp_path / "out" / "test")
    assert train | test == payloads(source)
    assert not {key.split("-")[0] for key in train} & {key.split("-")[0] for key in test}
    # 36 expected; 12 sources of 60, give or take three deviations.
    assert 9 <= len(test) <= 63
    assert sum(report.folders.values()) == 180
    for name in ("train", "test"):
        assert verify.run(tmp_path / "out" / name).faults == []
    other = rearrange.split(source, tmp_path / "other", {"train": 80, "test": 20}, samples_per_shard=50, seed=1)
    assert payloads(tmp_path / "other" / "test").keys() != test.keys(), other


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train=1", "two or more"),
        ("a=1,a=2", "new name"),
        ("a=0,b=1", "positive"),
        ("a,b", "NAME=SHARE"),
        ("../a=1,b=1", "NAME"),
    ],
)
def test_wrong_parts_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        rearrange.parse_shares(text)


def test_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_folder(tmp_path / "a", 0), write_folder(tmp_path / "b", 1)

    def data(*arguments: object) -> dict[str, Any]:
        assert run_command(cli.main, [*map(str, arguments), "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    assert data("merge", "--in", first, second, "--out", tmp_path / "m")["shards"] == 4
    assert data("reshard", "--in", tmp_path / "m", "--out", tmp_path / "r", "--samples-per-shard", 5)["shards"] == 5
    clips = write_clips_of_sources(tmp_path / "c", sources=20, clips=1)
    parts = data("split", "--in", clips, "--out", tmp_path / "s", "--parts", "train=1,test=1")
    assert sum(parts["folders"].values()) == 20
    assert run_command(cli.main, ["reshard", "--in", str(first), "--out", str(tmp_path / "m")]) == 2
    assert "holds shards made by `data merge`; name a new folder" in capsys.readouterr().err
    assert run_command(cli.main, ["merge", "--in", str(first), str(first), "--out", str(tmp_path / "n")]) == 2
    assert "two or more different folders are needed" in capsys.readouterr().err
    assert run_command(cli.main, ["reshard", "--in", str(first), "--out", str(tmp_path / "n"), "--seed", "-1"]) == 2
    assert "--seed -1 must not be negative" in capsys.readouterr().err
