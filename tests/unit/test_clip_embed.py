"""Embeddings of clips by a local CLIP, against transformers used plainly, and balance on top of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_clips import write_clips
from tiny_clip import WIDTH, write_tiny_clip
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_prep import clip_embed
from data_prep.cli import main
from data_prep.clip_embed import Embedded, embed_clips
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, read_manifest, table_from_rows, write_manifest
from megatron_video.video_io import read_frames

CAPTIONS = ["a red cat", "blue", "cat", "a dog", "tree"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 10 frames of noise, and a picture."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5, 10, 6, 8, 3), np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    clips = {f"v{number}.mp4": (noise[number], CAPTIONS[number]) for number in range(4)}
    clips["x.png"] = noise[4, :1], CAPTIONS[4]
    return write_clips(tmp_path_factory.mktemp("clips"), clips)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def rows_of(path: Path) -> list[Row]:
    rows: list[Row] = read_manifest(path).to_pylist()
    return rows


def plain(clip: Path, row: Row, what: str) -> np.ndarray:
    """The definition, with nothing of ours but the video reader."""
    model = CLIPModel.from_pretrained(clip).eval()
    numbers = [0] if row["is_image"] else np.rint(np.linspace(0, 9, 8)).astype(int).tolist()
    frames = list(read_frames(row["source"], indices=numbers))
    with torch.inference_mode():
        pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=frames, return_tensors="pt")
        pictures = model.vision_model(**pixels).pooler_output @ model.visual_projection.weight.T
        tokens = CLIPTokenizer.from_pretrained(clip)(row["caption"], return_tensors="pt")
        words = model.text_model(**tokens).pooler_output @ model.text_projection.weight.T
    picture, word = (unit(unit(v.numpy()).mean(axis=0)) for v in (pictures, words))
    return {"frames": picture, "caption": word, "both": unit(picture + word)}[what]


def unit(vectors: np.ndarray) -> np.ndarray:
    result: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return result


@pytest.mark.parametrize("what", ["frames", "caption", "both"])
def test_embeddings_are_those_of_the_library(manifest: Path, clip: Path, tmp_path: Path, what: Embedded) -> None:
    embed_clips(manifest, clip, tmp_path / "e.parquet", what, batch_size=2, workers=2)
    table = pq.read_table(tmp_path / "e.parquet").to_pylist()
    rows = rows_of(manifest)
    assert [entry["clip_id"] for entry in table] == [row["clip_id"] for row in rows]
    for entry, row in zip(table, rows, strict=True):
        assert len(entry["embedding"]) == WIDTH
        assert np.allclose(entry["embedding"], plain(clip, row, what), atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_a_stopped_run_goes_on_from_its_parts_and_a_finished_one_is_not_redone(
    manifest: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_clips(manifest, clip, tmp_path / "whole.parquet", "frames")
    monkeypatch.setattr(clip_embed, "PART_CLIPS", 2)
    read: list[str] = []
    pictures = clip_embed._pictures

    def counted(row: Row) -> Any:
        read.append(row["source"])
        if len(read) == 4:
            raise KeyboardInterrupt
        return pictures(row)

    monkeypatch.setattr(clip_embed, "_pictures", counted)
    with pytest.raises(KeyboardInterrupt):
        embed_clips(manifest, clip, tmp_path / "e.parquet", "frames", batch_size=1)
    assert not (tmp_path / "e.parquet").exists()
    embed_clips(manifest, clip, tmp_path / "e.parquet", "frames", batch_size=1)
    # Two of the first part, two of the stopped one, and the three clips of the parts that were missing.
    assert len(read) == 7
    assert pq.read_table(tmp_path / "e.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    embed_clips(manifest, clip, tmp_path / "e.parquet", "frames", batch_size=1)
    assert len(read) == 7


def test_balance_embeds_and_finds_the_copy_that_was_encoded_again(manifest: Path, clip: Path, tmp_path: Path) -> None:
    rows = rows_of(manifest)
    # The video shows one picture longer than the other does; the picture is not quite the same, as H.264 has lost some.
    still = read_frames(rows[4]["source"]).repeat(9, axis=0)
    copy = write_clips(tmp_path, {"again.mp4": (still, "tree")})
    gone = {**rows[0], "clip_id": "gone", "source": str(tmp_path / "gone.mp4")}
    write_manifest(table_from_rows([*rows, *rows_of(copy), gone]), tmp_path / "in.parquet")
    options = ["--clip", str(clip), "--clusters", "1", "--duplicate-similarity", "0.96", "--outlier-deviations", "0"]
    out = tmp_path / "out.parquet"
    assert main(["balance", "--in", str(tmp_path / "in.parquet"), "--out", str(out), *options]) == 0
    found = {row["source"].rsplit("/", 1)[1]: row for row in rows_of(out)}
    # The longer of the two stays.
    assert found["x.png"]["duplicate_of"] == found["again.mp4"]["clip_id"]
    assert found["gone.mp4"]["drop_reason"] == "no embedding: missing, zero or not finite"
    kept = {name for name, row in found.items() if not row["dropped_by"]}
    assert kept == {"v0.mp4", "v1.mp4", "v2.mp4", "v3.mp4", "again.mp4"}
    assert (tmp_path / "out.embeddings.parquet").is_file()


def test_other_files_and_folders_are_refused(
    manifest: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.parquet").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        embed_clips(manifest, clip, tmp_path / "e.parquet", "frames")
    common = ["balance", "--in", str(manifest), "--out", str(tmp_path / "o.parquet")]
    assert run_command(main, [*common, "--clip", str(tmp_path / "none")]) == 2
    assert "no such folder; nothing is downloaded" in capsys.readouterr().err
    assert run_command(main, [*common, "--clip", str(tmp_path)]) == 2
    assert "no CLIP model there" in capsys.readouterr().err
