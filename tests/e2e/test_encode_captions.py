"""`encode --captions`: states of every kind of caption, with subset and weight, from manifest to data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep import cli, demo_clips, run, verify
from megatron_video.cli import run_command
from megatron_video.manifest import read_manifest, table_from_rows, write_manifest
from megatron_video.shards import ShardDataset
from megatron_video.text import TextEncoders, text_folders
from megatron_video.vae import VAEConfig, VideoVAE, save_vae
from training import build_text_encoders
from training.data_config import DataConfig
from training.data_set import TrainingData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with captions of two kinds, subsets and weights, and tiny encoders."""
    folder = tmp_path_factory.mktemp("captions")
    demo_clips.make_demo_clips(folder / "raw", clips=12, seed=0)
    run.run(folder / "raw", folder / "work")
    rows = read_manifest(folder / "work" / run.RESULT).to_pylist()
    for number, row in enumerate(rows):
        row |= {"caption_short": f"short {number}", "caption_dense": f"dense {number}" if number % 2 else None}
        row |= {"subset": f"s{number % 2}", "weight": 0.5 + number}
    write_manifest(table_from_rows(rows), folder / "manifest.parquet")
    torch.manual_seed(0)
    steps = {"encoder_multipliers": (1, 1, 1, 1), "decoder_multipliers": (1, 1, 1, 1), "num_res_blocks": 1}
    save_vae(VideoVAE(VAEConfig(latent_channels=4, encoder_channels=32, decoder_channels=32, **steps)), folder / "vae")
    build_text_encoders.main(["build", "--captions", str(folder / "manifest.parquet"), "--out", str(folder / "text")])
    return folder


def encode(folder: Path, captions: str, out: str) -> int:
    arguments = {"--in": "manifest.parquet", "--vae": "vae", "--text": "text", "--out": out}
    paths = [part for name, file in arguments.items() for part in (name, str(folder / file))]
    settings = ["--buckets", "17x32x32,1x32x32", "--workers", "1", "--device", "cpu", "--captions", captions]
    return run_command(cli.main, ["encode", *paths, *settings])


def test_every_kind_is_encoded_and_comes_along_with_subset_and_weight(folder: Path) -> None:
    assert encode(folder, "dense,short", "shards") == 0
    dataset = ShardDataset(folder / "shards")
    assert dataset.rows.info.captions == ["dense", "short"]
    rows = {row["clip_id"]: row for row in read_manifest(folder / "manifest.parquet").to_pylist()}
    text = TextEncoders.load(*text_folders(folder / "text"), "cpu", torch.float32)
    seen = set()
    for number, index in enumerate(dataset.index.to_pylist()):
        sample, row = dataset[number], rows[index["key"]]
        kinds = [kind for kind in ("dense", "short") if row[f"caption_{kind}"]]
        assert [*sample.captions] == kinds
        assert sample.metadata["caption"] == row[f"caption_{kinds[0]}"]
        for kind, (llm, _) in sample.captions.items():
            (states,) = text.encode([row[f"caption_{kind}"]])
            torch.testing.assert_close(llm.float(), states.llm, rtol=1e-2, atol=1e-2)
        assert (index["subset"], index["weight"]) == (row["subset"], row["weight"])
        seen.add(tuple(kinds))
    assert seen == {("dense", "short"), ("short",)}
    assert verify.run(folder / "shards").faults == []
    config = DataConfig(shards=[str(folder / "shards")], caption_weights={"dense": 1, "short": 1}, subsets=["s1"])
    drawn = [n for group in TrainingData.open(config).groups().values() for n in group[range(len(group))].tolist()]
    assert {dataset.index["subset"][n].as_py() for n in drawn} == {"s1"}


def test_a_kind_that_no_clip_has_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(folder, "title", "none") == 2
    assert "no clip has a caption of that kind" in capsys.readouterr().err
