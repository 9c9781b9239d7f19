"""Sources of training: blends, weights, subsets, and captions of several kinds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LATENT_CHANNELS, LLM_DIM, write_tiny_shards

from data_prep.clip_encoder import captions_of
from data_prep.encode import EncodeSettings, parse_kinds
from data_prep.rearrange import reshard
from data_prep.verify import run as verify
from megatron_video.blend import write_blend
from megatron_video.buckets import parse_bucket, parse_buckets
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flow_matching import TimeDensity
from megatron_video.manifest import table_from_rows, write_manifest
from megatron_video.noise import NoiseSource
from megatron_video.shard_schema import DatasetInfo, ShardSample, Text, shard_name
from megatron_video.shards import ShardDataset, ShardWriter, finish_dataset, write_null_text
from training.balance import PlannedBatch
from training.data import BatchBuilder
from training.data_config import DataConfig
from training.data_set import TrainingData
from training.sample_groups import ChainedGroup, ListedGroup, Part

BUCKET = "1x48x48"
KINDS = ("dense", "short", "title")
SUBSETS = ("s1", "s2", "s3")


def write_captioned_shards(folder: Path, samples: int = 60) -> Path:
    """Samples with one to three kinds of captions, each with states of its own, in three subsets, with weights."""
    with ShardWriter(folder, shard_name(0), KINDS) as writer:
        for number in range(samples):
            subset, weight = SUBSETS[number % 3], 0.5 + number % 2
            writer.add(captioned(number), parse_bucket(BUCKET), subset=subset, weight=weight)
    write_null_text(folder, torch.full((2, LLM_DIM), -1.0), torch.zeros(CLIP_SLOTS, CLIP_DIM))
    info = DatasetInfo("vae", "text", LATENT_CHANNELS, LLM_DIM, CLIP_DIM, CLIP_SLOTS, captions=list(KINDS))
    finish_dataset(folder, info)
    rows = [{"clip_id": f"clip{n:03d}", "bucket": BUCKET, "shard": shard_name(0)} for n in range(samples)]
    write_manifest(table_from_rows(rows), folder / "manifest.parquet")
    return folder


def captioned(number: int) -> ShardSample:
    texts = {kind: text_of(number, kind) for kind in kinds_of(number)}
    first = next(iter(texts.values()))
    moments = torch.zeros(1, 2 * LATENT_CHANNELS, 3, 3)
    return ShardSample(f"clip{number:03d}", moments, *first, {"caption": "x", "fps": 1.0}, texts)


def kinds_of(number: int) -> tuple[str, ...]:
    return (KINDS[:2], KINDS, ("short",), ("title",))[number % 4]


def text_of(number: int, kind: str) -> Text:
    place = KINDS.index(kind)
    return torch.full((2 + 3 * place, LLM_DIM), float(number * 4 + place)), torch.full((CLIP_SLOTS, CLIP_DIM), 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned_shards(tmp_path_factory.mktemp("captioned"))


def builder_of(data: TrainingData) -> BatchBuilder:
    channels = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    model = DiTConfig(num_layers=1, num_attention_heads=2, caption_channels=[LLM_DIM, CLIP_DIM], **channels)
    return BatchBuilder(data, NoiseSource(1, "test"), TimeDensity(), 0.0, torch.float32, model)


def drawn_kind(data: TrainingData, sample: int, epoch: int) -> str:
    batch = builder_of(data).build(PlannedBatch(BUCKET, np.array([sample]), np.array([epoch])))
    value = int(batch.llm_states[0, 0, 0])
    assert value // 4 == sample
    return KINDS[value % 4]


def test_captions_come_back_by_kind(folder: Path) -> None:
    dataset = ShardDataset(folder)
    for number in range(8):
        found = dataset[number]
        assert [*found.captions] == [*kinds_of(number)]
        for kind, (llm, clip) in found.captions.items():
            assert torch.equal(llm, text_of(number, kind)[0].bfloat16())
            assert torch.equal(clip, text_of(number, kind)[1].bfloat16())
        assert torch.equal(found.llm, text_of(number, kinds_of(number)[0])[0].bfloat16())


def test_kinds_are_drawn_by_weight_among_those_that_a_sample_has(folder: Path) -> None:
    data = TrainingData.open(DataConfig(shards=[str(folder)], caption_weights={"dense": 3, "short": 1}))
    drawn = [drawn_kind(data, 4, epoch) for epoch in range(400)]
    assert 0.66 < drawn.count("dense") / 400 < 0.84
    assert {*drawn} == {"dense", "short"}
    assert drawn == [drawn_kind(data, 4, epoch) for epoch in range(400)]
    assert {drawn_kind(data, 2, epoch) for epoch in range(20)} == {"short"}
    # It has none of them: its own.
    assert {drawn_kind(data, 3, epoch) for epoch in range(20)} == {"title"}
    whatever = TrainingData.open(DataConfig(shards=[str(folder)]))
    assert {drawn_kind(whatever, 4, epoch) for epoch in range(20)} == {"dense"}


def test_lengths_are_those_of_the_kinds_that_are_drawn(folder: Path) -> None:
    numbers = np.arange(4)
    plain = TrainingData.open(DataConfig(shards=[str(folder)]))
    assert plain.llm_tokens(numbers).tolist() == [2, 2, 5, 8]
    weighted = TrainingData.open(DataConfig(shards=[str(folder)], caption_weights={"short": 2, "title": 1}))
    assert weighted.llm_tokens(numbers).tolist() == [5, 6, 5, 8]


def test_kinds_that_the_shards_lack_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"caption_weights names \['long'\].*dense.*short.*title"):
        TrainingData.open(DataConfig(shards=[str(folder)], caption_weights={"long": 1, "short": 1}))
    plain = write_tiny_shards(tmp_path / "plain", {"1x48x48": 3})
    with pytest.raises(UserError, match=r"one caption a sample.*--captions"):
        TrainingData.open(DataConfig(shards=[str(plain)], caption_weights={"short": 1}))
    with (
        pytest.raises(UserError, match=r"captions of \['short'\]"),
        ShardWriter(tmp_path / "x", shard_name(0)) as shard,
    ):
        shard.add(captioned(2), parse_bucket(BUCKET))


def test_copies_keep_captions_subsets_and_weights(folder: Path, tmp_path: Path) -> None:
    reshard(folder, tmp_path / "other", samples_per_shard=7)
    copy, dataset = ShardDataset(tmp_path / "other"), ShardDataset(folder)
    for name in ("key", "caption_tokens", "subset", "weight"):
        assert copy.index[name].to_pylist() == dataset.index[name].to_pylist()
    assert [*copy[1].captions] == [*KINDS]
    assert copy.dataset_info.captions == [*KINDS]


def test_verification_compares_captions_with_the_index(folder: Path, tmp_path: Path) -> None:
    assert not verify(folder).faults
    with ShardWriter(tmp_path, shard_name(0), KINDS) as writer:
        writer.add(captioned(1), parse_bucket(BUCKET))
        writer._rows["clip001"]["caption_tokens"] = [2, 6, 8]
    write_null_text(tmp_path, torch.zeros(2, LLM_DIM), torch.zeros(CLIP_SLOTS, CLIP_DIM))
    sizes = (LATENT_CHANNELS, LLM_DIM, CLIP_DIM, CLIP_SLOTS)
    finish_dataset(tmp_path, DatasetInfo("vae", "text", *sizes, captions=list(KINDS)))
    assert any("'short': 5" in fault and "[2, 6, 8]" in fault for fault in verify(tmp_path).faults)


def test_a_subset_leaves_only_its_samples(folder: Path) -> None:
    data = TrainingData.open(DataConfig(shards=[str(folder)], subsets=["s2", "s3"]))
    group = data.groups()["shards", BUCKET]
    assert sorted(group[np.arange(len(group))].tolist()) == [n for n in range(60) if n % 3]
    with pytest.raises(UserError, match=r"no sample of the subsets \['s9'\].*s1, s2, s3"):
        TrainingData.open(DataConfig(shards=[str(folder)], subsets=["s9"]))


def test_a_blend_gives_every_folder_its_share_and_subsets(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_shards(tmp_path / "other", {BUCKET: 5}, seed=4)
    path = tmp_path / "blend.yaml"
    write_blend(path, [folder, other], [3, 1])
    path.write_text(path.read_text().replace("samples: 60\n  subsets: null", "samples: 60\n  subsets: [s1]"))
    data = TrainingData.open(DataConfig(blend=str(path)))
    assert data.source_weights == [3, 1]
    groups = data.groups()
    assert {key: len(group) for key, group in groups.items()} == {
        (n, BUCKET): c for n, c in zip(data.sources, (20, 5), strict=True)
    }
    # Numbers do not depend on what is drawn from.
    assert groups[data.sources[1], BUCKET][np.arange(5)].tolist() == [*range(60, 65)]
    with pytest.raises(UserError, match="none in common"):
        TrainingData.open(DataConfig(blend=str(path), subsets=["s2"]))


def test_weights_of_folders_name_sources(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_shards(tmp_path / "other", {BUCKET: 5}, seed=4)
    data = TrainingData.open(DataConfig(shards=[str(folder), str(other)], shard_weights=[1, 2]))
    assert (data.sources, data.source_weights) == ([str(folder), str(other)], [1, 2])
    together = TrainingData.open(DataConfig(shards=[str(folder), str(other)]))
    assert (together.sources, together.source_weights) == (["shards"], None)
    assert len(together.groups()["shards", BUCKET]) == 65


def test_weights_of_samples_can_be_left_out(folder: Path) -> None:
    weighted, alike = (
        TrainingData.open(DataConfig(shards=[str(folder)], sample_weights=on)).groups()["shards", BUCKET]
        for on in (True, False)
    )
    assert weighted.total_weight == 60 << 16
    assert alike.total_weight is None


def test_chained_groups_are_one_after_the_other() -> None:
    parts = [ListedGroup(np.array([4, 2])), ListedGroup(np.array([1, 0, 3]), np.array([1.0, 0.0, 0.5]))]
    chain = ChainedGroup([Part(parts[0], 10), Part(parts[1], 100)])
    assert chain[np.array([4, 0, 2, 1])].tolist() == [103, 14, 101, 12]
    assert chain.total_weight == int(3.5 * (1 << 16))
    units = np.array([0, 1 << 16, 2 << 16, 3 << 16])
    assert chain.locate(units).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blend": "b.yaml", "shards": ["a"]}, "leave shards"),
        ({"shards": ["a"], "shard_weights": [1, 2]}, "2 shares for 1"),
        ({"shards": ["a"], "shard_weights": [0]}, "one of them above 0"),
        ({"subsets": []}, "null takes all"),
        ({"caption_weights": {"short": -1}}, "caption_weights"),
        ({"max_corrupt_samples": -1}, "max_corrupt_samples=-1"),
        ({"read_attempts": 0}, "read_attempts"),
    ],
)
def test_contradictions_of_the_configuration_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)  # type: ignore[arg-type]


def test_encode_takes_the_captions_that_a_clip_has() -> None:
    row = {"caption": "own", "caption_dense": None, "caption_short": "s", "caption_title": "t"}
    assert captions_of(row, parse_kinds("dense,short")) == {"short": "s"}
    assert captions_of(row, parse_kinds("title, short")) == {"title": "t", "short": "s"}
    assert captions_of(row, parse_kinds("dense")) == captions_of(row, parse_kinds(None)) == {"": "own"}
    for wrong in ("long", "short,short"):
        with pytest.raises(UserError, match="at most once"):
            parse_kinds(wrong)


def test_folders_that_were_begun_without_kinds_are_continued() -> None:
    settings = EncodeSettings(parse_buckets(BUCKET))
    assert "captions" not in json.dumps(settings.identity)
    assert "captions" in json.dumps(EncodeSettings(parse_buckets(BUCKET), captions=("short",)).identity)
