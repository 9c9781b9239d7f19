"""The mapped index: says what index.parquet says, is made anew when that changes, and checks what needs all rows."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LATENT_CHANNELS, LLM_DIM, write_tiny_shards

from megatron_video import unique_keys
from megatron_video.buckets import parse_bucket
from megatron_video.errors import UserError
from megatron_video.files import appearing
from megatron_video.shard_index import WEIGHT_UNIT, ClassRows
from megatron_video.shard_index_open import MAP_FILE, is_true, open_index
from megatron_video.shard_schema import INDEX_SCHEMA, PAYLOADS, DatasetInfo, ShardSample, shard_name
from megatron_video.shards import ShardDataset, ShardWriter, finish_dataset, write_null_text
from megatron_video.unique_keys import KeyCheck

BUCKETS, SUBSETS = ("17x48x48", "1x48x48"), (None, "s1", "s2")


def write_mixed_shards(folder: Path, samples: int = 1500) -> Path:
    """Shards whose buckets, subsets and weights change from sample to sample, in one tar a third."""
    generator = np.random.default_rng(0)
    bucket_of, subset_of = generator.integers(2, size=samples), generator.integers(3, size=samples)
    weights = np.where(generator.random(samples) < 0.1, 0.0, generator.random(samples) * 3)
    for number, part in enumerate(np.array_split(np.arange(samples), 3)):
        with ShardWriter(folder, shard_name(number)) as writer:
            for row in part.tolist():
                bucket = parse_bucket(BUCKETS[bucket_of[row]])
                sample = tiny_sample(f"sample-{row:05d}" + "x" * (row % 5), bucket.name)
                writer.add(sample, bucket, subset=SUBSETS[subset_of[row]], weight=float(weights[row]))
    write_null_text(folder, torch.zeros(2, LLM_DIM), torch.zeros(CLIP_SLOTS, CLIP_DIM))
    finish_dataset(folder, DatasetInfo("vae", "text", LATENT_CHANNELS, LLM_DIM, CLIP_DIM, CLIP_SLOTS))
    return folder


def tiny_sample(key: str, bucket: str) -> ShardSample:
    frames, height, width = parse_bucket(bucket).latent_shape
    moments = torch.zeros(frames, 2 * LATENT_CHANNELS, height, width)
    llm = torch.zeros(1 + len(key) % 7, LLM_DIM)
    return ShardSample(key, moments, llm, torch.zeros(CLIP_SLOTS, CLIP_DIM), {"caption": key})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed_shards(tmp_path_factory.mktemp("mixed"))


def test_every_row_is_that_of_the_table(mixed: Path) -> None:
    dataset = ShardDataset(mixed)
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        for number, row in enumerate(dataset.index.to_pylist()):
            found = copy.rows.row(number)
            assert (found.key, found.shard, found.bucket) == (row["key"], row["shard"], row["bucket"])
            assert found.places == {name: (row[f"{name}_offset"], row[f"{name}_size"]) for name in PAYLOADS}
            assert found.checksum == row["checksum"]
    tokens = dataset.rows.tokens(np.arange(len(dataset)))
    assert tokens[:, 0].tolist() == dataset.index["llm_tokens"].to_pylist()


@pytest.mark.parametrize("subsets", [None, ["s1"], ["s1", "s2"]])
def test_classes_hold_the_rows_of_their_bucket_and_subset(mixed: Path, subsets: list[str] | None) -> None:
    dataset = ShardDataset(mixed)
    table = dataset.index.to_pylist()
    for bucket in BUCKETS:
        found = [rows[np.arange(len(rows))] for rows in dataset.rows.select(bucket, subsets)]
        wanted = {n for n, r in enumerate(table) if r["bucket"] == bucket and (not subsets or r["subset"] in subsets)}
        assert sorted(np.concatenate(found).tolist()) == sorted(wanted)
        assert all((np.diff(rows) > 0).all() for rows in found)


def test_a_share_of_the_summed_weights_finds_its_sample(mixed: Path) -> None:
    dataset = ShardDataset(mixed)
    weights = dataset.index["weight"].to_numpy().astype(np.float64)
    for rows in dataset.rows.select("17x48x48"):
        own = weights[rows[np.arange(len(rows))]]
        assert rows.total_weight == pytest.approx(own.sum() * WEIGHT_UNIT, rel=1e-4)
        assert rows.total_weight is not None
        places = rows.locate(np.arange(0, rows.total_weight, 97))
        counts = np.bincount(places, minlength=len(rows)) * 97 / WEIGHT_UNIT
        assert np.abs(counts - own).max() < 2 * 97 / WEIGHT_UNIT
        assert not counts[own == 0].any()


def test_weights_span_several_blocks(mixed: Path) -> None:
    # Else the search by marks would not be tried.
    assert max(len(rows) for rows in ShardDataset(mixed).rows.select("17x48x48", ["s1"])) > 200
    index = open_index(mixed)
    ends = index.section("weights")
    assert len(index.section("marks")) == sum(-(-entry.rows // 512) for entry in index.classes)
    for entry in index.classes:
        assert entry.weights is not None
        last = index.section("marks")[entry.weights[1] + -(-entry.rows // 512) - 1]
        assert last == ends[entry.weights[0] + entry.rows - 1] == ClassRows(index, entry).total_weight


def test_opening_neither_reads_the_table_nor_writes(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (mixed / MAP_FILE).stat().st_mtime_ns
    monkeypatch.setattr(pq, "ParquetFile", None)
    monkeypatch.setattr(pq, "read_table", None)
    monkeypatch.setattr("megatron_video.shard_index_open.file_sha256", None)
    assert len(ShardDataset(mixed)) == 1500
    assert (mixed / MAP_FILE).stat().st_mtime_ns == before


def test_a_copy_with_other_times_is_compared_by_content_once(tmp_path: Path) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    made = (folder / MAP_FILE).read_bytes()
    os.utime(folder / "index.parquet", ns=(1, 10**18))
    os.utime(folder / "dataset_info.json", ns=(1, 10**18))
    open_index(folder)
    assert (folder / MAP_FILE).stat().st_mtime_ns == 10**18
    assert (folder / MAP_FILE).read_bytes() == made


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_map_that_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    path, made = folder / MAP_FILE, (folder / MAP_FILE).read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(made[:5000] if damage == "cut" else b"something else entirely" * 9)
    assert ShardDataset(folder)[3].key == "17x48x48-0-3"
    assert path.read_bytes() == made


def test_a_changed_table_gives_another_map(tmp_path: Path) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    before = open_index(folder).fingerprint
    table = pq.read_table(folder / "index.parquet")
    pq.write_table(table.slice(0, 30), folder / "index.parquet")
    index = open_index(folder)
    assert len(index) == 30
    assert index.fingerprint != before
    assert is_true(index, folder)


def test_verification_sees_a_map_that_differs(tmp_path: Path) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    path = folder / MAP_FILE
    content = bytearray(path.read_bytes())
    content[4096 + 20] ^= 1
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not is_true(open_index(folder), folder)


def test_a_folder_that_cannot_be_written_has_its_map_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    made = (folder / MAP_FILE).read_bytes()
    (folder / MAP_FILE).unlink()
    # Tests run as root too, whom modes do not stop.
    monkeypatch.setattr("megatron_video.shard_index_open.appearing", functools.partial(refuse_below, folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = open_index(folder).path
    assert path.is_relative_to(tmp_path / "cache")
    assert path.read_bytes() == made
    assert not (folder / MAP_FILE).exists()


def refuse_below(folder: Path, path: Path) -> AbstractContextManager[Path]:
    if path.parent == folder:
        raise PermissionError(13, "read-only", str(path))
    return appearing(path)


def test_folders_of_the_first_version_stay_readable(tmp_path: Path) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    expected = [ShardDataset(folder)[number].key for number in range(41)]
    table = pq.read_table(folder / "index.parquet")
    pq.write_table(table.drop(["caption_tokens", "subset", "weight"]), folder / "index.parquet")
    info = (folder / "dataset_info.json").read_text()
    info = info.replace('"schema_version": 2', '"schema_version": 1').replace(' "captions": [],\n', "")
    assert "captions" not in info
    (folder / "dataset_info.json").write_text(info)
    dataset = ShardDataset(folder)
    assert [dataset[number].key for number in range(41)] == expected
    assert dataset.index.schema.names == INDEX_SCHEMA.names
    assert dataset.rows.select("17x48x48")[0].total_weight is None


def test_rows_without_a_weight_count_as_one(tmp_path: Path) -> None:
    folder = write_mixed_shards(tmp_path / "shards", samples=40)
    table = pq.read_table(folder / "index.parquet")
    weights = pa.array([None, 2.5] * 20, pa.float32())
    pq.write_table(table.set_column(table.num_columns - 1, "weight", weights), folder / "index.parquet")
    total = sum(rows.total_weight or 0 for bucket in BUCKETS for rows in open_index(folder).select(bucket))
    assert total == 20 * WEIGHT_UNIT + 20 * 2.5 * WEIGHT_UNIT


def test_keys_are_compared_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unique_keys, "_PART", 100)
    keys = np.array([f"key-{number}".encode() for number in range(1000)])
    check = KeyCheck(len(keys), tmp_path)
    for part in np.array_split(keys, 3):
        check.add(part)
    assert check.duplicate(lambda places: keys[places]) is None
    keys[777] = keys[12]
    check = KeyCheck(len(keys), tmp_path)
    check.add(keys)
    found = check.duplicate(lambda places: keys[places])
    assert found is not None
    assert found.tolist() == [12, 777]


def test_equal_hashes_of_different_keys_are_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.array([b"a", b"b", b"c", b"b"])
    monkeypatch.setattr(unique_keys, "hash_keys", lambda keys: np.full(len(keys), 7, np.uint64))
    check = KeyCheck(4, tmp_path)
    check.add(keys)
    found = check.duplicate(lambda places: keys[places])
    assert found is not None
    assert found.tolist() == [1, 3]
    check = KeyCheck(3, tmp_path)
    check.add(keys[:3])
    assert check.duplicate(lambda places: keys[places]) is None


def test_a_folder_with_a_key_twice_is_not_finished(tmp_path: Path) -> None:
    folder = write_tiny_shards(tmp_path / "shards")
    for kind in ("tar", "index.parquet"):
        source = next(folder.rglob(f"shard-000000.{kind}"))
        shutil.copy(source, source.with_name(f"shard-000009.{kind}"))
    with pytest.raises(UserError, match=r"occurs in shard-00000.*unique"):
        finish_dataset(folder, DatasetInfo("vae", "text", LATENT_CHANNELS, LLM_DIM, CLIP_DIM, CLIP_SLOTS))
    with pytest.raises(UserError, match="no finished shards"):
        ShardDataset(folder)
