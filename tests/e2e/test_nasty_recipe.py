"""A folder of nasty files through a whole recipe: what can be read ends in verified shards, the rest has its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from nasty_folder import LONG_CAPTION, make_nasty_folder

from data_prep import cli
from megatron_video.cli import run_command
from megatron_video.manifest import Row, read_manifest
from megatron_video.shards import ShardDataset
from megatron_video.vae import VAEConfig, VideoVAE, save_vae
from training import build_text_encoders

RECIPE = """
stages:
  - ingest:
  - segment: {max_seconds: 4}
  - tag:
  - encode: {vae: "{work}/vae", text: "{work}/text", buckets: "1x48x64,17x48x64,17x64x48", samples_per_shard: 8}
  - verify:
"""


def make_encoders(work: Path, captions: Path) -> None:
    torch.manual_seed(0)
    widths = {"encoder_channels": 32, "decoder_channels": 32}
    steps = {"encoder_multipliers": (1, 1, 1, 1), "decoder_multipliers": (1, 1, 1, 1), "num_res_blocks": 1}
    save_vae(VideoVAE(VAEConfig(latent_channels=4, **widths, **steps)), work / "vae")
    assert build_text_encoders.main(["build", "--captions", str(captions), "--out", str(work / "text")]) in (0, None)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nasty")
    make_nasty_folder(folder / "raw")
    (folder / "recipe.yaml").write_text(RECIPE)
    options = ["--recipe", folder / "recipe.yaml", "--in", folder / "raw", "--work", folder, "--workers", 1]
    command = ["run", *map(str, options)]
    assert run_command(cli.main, [*command, "--until", "tag"]) == 0
    make_encoders(folder, folder / "3-tag.parquet")
    assert run_command(cli.main, command) == 0
    return folder


def rows_of(manifest: Path) -> list[Row]:
    rows: list[Row] = read_manifest(manifest).to_pylist()
    return rows


def test_every_file_is_accounted_for_and_shards_verify(work: Path) -> None:
    fates = make_nasty_folder(work / "again")
    rows = rows_of(work / "4-encode" / "manifest.parquet")
    raw, again = str(work / "raw"), str(work / "again")
    assert {row["source"] for row in rows} == {path.replace(again, raw) for path in fates}
    kept = [row for row in rows if not row["dropped_by"]]
    dataset = ShardDataset(work / "4-encode")
    assert len(dataset) == len(kept) == len({row["clip_id"] for row in kept}) > 30
    stages = json.loads((work / "report.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["ingest", "segment", "tag", "encode", "verify"]
    assert stages[4]["report"]["faults"] == []
    # Nothing that could be read and is long enough is lost on the way to the shards.
    assert Counter(row["dropped_by"] for row in rows).keys() == {None, "ingest", "segment"}


def test_each_codec_and_each_kind_of_picture_is_in_the_shards(work: Path) -> None:
    kept = [row for row in rows_of(work / "4-encode" / "manifest.parquet") if not row["dropped_by"]]
    codecs = {row["codec"] for row in kept}
    assert codecs >= {"h264", "hevc", "vp9", "libdav1d", "mpeg4", "prores", "ffv1", "mjpeg", "gif", "png", "webp"}
    assert {row["rotation"] for row in kept} == {0, 90}
    assert {row["bucket"] for row in kept} == {"1x48x64", "17x48x64", "17x64x48"}
    assert any(row["hdr"] for row in kept)
    assert any(row["variable_fps"] for row in kept)


def test_a_caption_of_ten_thousand_characters_is_cut_by_the_tokenizer(work: Path) -> None:
    (row,) = [row for row in rows_of(work / "4-encode" / "manifest.parquet") if row["caption"] == LONG_CAPTION]
    assert not row["dropped_by"]
    dataset = ShardDataset(work / "4-encode")
    (number,) = [n for n in range(len(dataset)) if dataset[n].key == row["clip_id"]]
    assert 0 < len(dataset[number].llm) <= 320
