"""Shards: what is written comes back, through our index and through the webdataset library; damage is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import xxhash
from safetensors.torch import load

from megatron_video.buckets import Bucket, choose_bucket, parse_bucket, parse_buckets
from megatron_video.errors import UserError
from megatron_video.shards import (
    DatasetInfo,
    ShardDataset,
    ShardSample,
    ShardWriter,
    finish_dataset,
    write_null_text,
)

INFO = DatasetInfo(vae_fingerprint="v", text_fingerprint="t", latent_channels=4, llm_dim=8, clip_dim=6, clip_tokens=5)
VIDEO, IMAGE = Bucket(17, 48, 64), Bucket(1, 48, 48)


def make_sample(number: int, bucket: Bucket) -> ShardSample:
    generator = torch.Generator().manual_seed(number)
    grid = bucket.latent_shape
    return ShardSample(
        key=f"{number:024x}-000003-000020",
        moments=torch.randn(grid.frames, 8, grid.height, grid.width, generator=generator).bfloat16(),
        llm=torch.randn(3 + number, 8, generator=generator).bfloat16(),
        clip=torch.randn(5, 6, generator=generator).bfloat16(),
        metadata={"caption": "一个红色的圆形", "number": number},
    )


def write_dataset(folder: Path) -> list[ShardSample]:
    samples = []
    for shard, bucket in enumerate([VIDEO, IMAGE]):
        with ShardWriter(folder, f"shard-{shard:06d}.tar") as writer:
            for number in range(4 * shard, 4 * shard + 4):
                samples.append(make_sample(number, bucket))
                writer.add(samples[-1], bucket)
    write_null_text(folder, torch.ones(2, 8), torch.ones(5, 6))
    finish_dataset(folder, INFO)
    return samples


def assert_same(found: ShardSample, sample: ShardSample) -> None:
    assert found.key == sample.key
    for name in ("moments", "llm", "clip"):
        assert torch.equal(getattr(found, name), getattr(sample, name))
        assert getattr(found, name).dtype == torch.bfloat16
    assert found.metadata["caption"] == sample.metadata["caption"]


def test_samples_come_back_by_number(tmp_path: Path) -> None:
    samples = write_dataset(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 8
    for number in (7, 0, 3, 4):
        assert_same(dataset[number], samples[number])
    assert_same(pickle.loads(pickle.dumps(dataset))[5], samples[5])
    assert dataset.index["llm_tokens"].to_pylist() == [3 + n for n in range(8)]
    assert dataset.index["bucket"].to_pylist() == ["17x48x64"] * 4 + ["1x48x48"] * 4
    assert dataset.dataset_info.buckets == {"17x48x64": 4, "1x48x48": 4}
    assert [tuple(tensor.shape) for tensor in dataset.null_text] == [(2, 8), (5, 6)]
    with pytest.raises(IndexError):
        dataset[8]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    samples = {sample.key: sample for sample in write_dataset(tmp_path)}
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [entry["__key__"] for entry in found] == list(samples)
    for entry in found:
        sample = samples[entry["__key__"]]
        assert torch.equal(load(entry["latent.safetensors"])["moments"], sample.moments)
        assert torch.equal(load(entry["text.safetensors"])["llm"], sample.llm)
        assert json.loads(entry["json"])["number"] == sample.metadata["number"]


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b")
    for path in sorted((tmp_path / "a").rglob("*.*")):
        twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == twin.read_bytes(), path
    record = ShardDataset(tmp_path / "a").dataset_info.shards[0]
    assert record["xxh3_128"] == xxhash.xxh3_128_hexdigest((tmp_path / "a" / record["name"]).read_bytes())


@pytest.mark.parametrize("payload", ["latent", "text", "json"])
def test_a_flipped_byte_names_the_shard_and_the_key(tmp_path: Path, payload: str) -> None:
    samples = write_dataset(tmp_path)
    dataset = ShardDataset(tmp_path)
    path = tmp_path / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[dataset.index[f"{payload}_offset"][6].as_py() + dataset.index[f"{payload}_size"][6].as_py() - 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"shard-000001\.tar: sample {samples[6].key}.*checksum"):
        dataset[6]
    assert_same(dataset[5], samples[5])


def test_a_read_that_fails_for_a_while_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = write_dataset(tmp_path)
    shard, away = tmp_path / "shard-000000.tar", tmp_path / "away.tar"
    shard.rename(away)
    pauses: list[float] = []

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        # The file server is back before the third attempt.
        if len(pauses) == 2:
            away.rename(shard)

    monkeypatch.setattr("megatron_video.shards.time.sleep", wait)
    with pytest.raises(UserError, match=r"shard-000000\.tar.*No such file"):
        ShardDataset(tmp_path, read_attempts=2)[0]
    assert len(pauses) == 1
    assert_same(ShardDataset(tmp_path, read_attempts=2)[0], samples[0])


def test_a_shard_that_ends_early_or_is_gone_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"shard-000001.*ends early"):
        ShardDataset(tmp_path)[7]
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000001.*No such file"):
        ShardDataset(tmp_path)[7]


def test_writer_refuses_a_latent_that_does_not_fit_its_bucket(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"\[3, 8, 3, 4\] do not fit bucket 1x48x48.*\[1, 8, 3, 3\]"),
        ShardWriter(tmp_path, "shard-000000.tar") as writer,
    ):
        writer.add(make_sample(1, VIDEO), IMAGE)
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob(".*.tmp"))


def test_reader_refuses_a_latent_that_does_not_fit_its_bucket(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    index = pq.read_table(tmp_path / "index.parquet")
    names = index["bucket"].to_pylist()
    names[2] = "17x64x48"
    pq.write_table(index.set_column(2, "bucket", [names]), tmp_path / "index.parquet")
    with pytest.raises(UserError, match=f"{make_sample(2, VIDEO).key}.*does not fit bucket 17x64x48"):
        ShardDataset(tmp_path)


def test_reader_refuses_moments_of_another_vae(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text()) | {"latent_channels": 16}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"\[3, 8, 3, 4\] do not fit bucket 17x48x64.*\[3, 32, 3, 4\]"):
        ShardDataset(tmp_path)[0]


def test_duplicate_keys_are_refused_in_a_shard_and_over_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "shard-000009.tar") as writer:
        writer.add(make_sample(1, VIDEO), VIDEO)
        with pytest.raises(UserError, match="unique"):
            writer.add(make_sample(1, VIDEO), VIDEO)
    with ShardWriter(tmp_path, "shard-000001.tar") as writer:
        writer.add(make_sample(1, VIDEO), VIDEO)
    write_null_text(tmp_path, torch.ones(2, 8), torch.ones(5, 6))
    with pytest.raises(UserError, match=r"shard-000001\.tar, shard-000009\.tar.*unique"):
        finish_dataset(tmp_path, INFO)


def test_unfinished_newer_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished shards"):
        ShardDataset(tmp_path)
    write_dataset(tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"schema_version": 99}))
    with pytest.raises(UserError, match="99"):
        ShardDataset(tmp_path)
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        ShardDataset(tmp_path)


def test_buckets() -> None:
    assert parse_buckets("17x48x64, 1x48x48,17x48x48,17x48x64") == (IMAGE, Bucket(17, 48, 48), VIDEO)
    for text, complaint in [("17x48", "FRAMES"), ("16x48x48", "17"), ("17x50x48", "16"), ("", "FRAMES")]:
        with pytest.raises(UserError, match=complaint):
            parse_bucket(text)
    buckets = parse_buckets("1x48x48,1x48x64,17x48x48,17x48x64,68x48x64")
    assert choose_bucket(buckets, 20, 720, 1280) == VIDEO
    assert choose_bucket(buckets, 20, 720, 640) == Bucket(17, 48, 48)
    assert choose_bucket(buckets, 70, 100, 100) == Bucket(68, 48, 64)
    assert choose_bucket(buckets, 1, 100, 100, is_image=True) == IMAGE
    assert choose_bucket(buckets, 16, 100, 100) is None
    assert choose_bucket(parse_buckets("17x48x48"), 1, 100, 100, is_image=True) is None
