"""The caption stage with a local vision-language model, with files, and what becomes of a row."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_clips import write_clips
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlm import write_tiny_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_prep import caption
from data_prep.caption_config import DEFAULT_PROMPTS, CaptionConfig, original_title, prompt_text
from data_prep.caption_mix import CaptionMix
from data_prep.cli import main
from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.manifest import SCHEMA, Row, read_manifest, table_from_rows, write_manifest
from megatron_video.video_io import read_frames

QUESTION = "what is it? title: {title} {braces}"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of noise and a picture."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 6, 6, 8, 3), np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    clips = {f"v{number}.mp4": (frames, f"title {number}") for number, frames in enumerate(noise)}
    clips["x.png"] = rng.integers(0, 256, (1, 40, 40, 3), np.uint8), "a picture"
    return write_clips(tmp_path_factory.mktemp("clips"), clips)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("vlm"))


def stage(*arguments: object) -> int:
    return run_command(main, ["caption", *(str(argument) for argument in arguments)])


def rows_of(path: Path) -> list[Row]:
    rows: list[Row] = read_manifest(path).to_pylist()
    return rows


def prompts(folder: Path, **more: Any) -> Path:
    path = folder / "prompts.yaml"
    fields = {"prompts": {"short": {"user": QUESTION, "max_tokens": 6}}, "frames": 2, "refusals": [], **more}
    path.write_text(json.dumps(fields))
    return path


# --- a local model --------------------------------------------------------------------------------------------------


def plain_answer(vlm: Path, row: Row, max_tokens: int) -> str:
    """What the model says when it is run alone, without any of our code but the video reader."""
    processor = AutoProcessor.from_pretrained(vlm)
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32)
    numbers = [0] if row["is_image"] else [0, 5]
    frames = [Image.fromarray(frame) for frame in read_frames(row["source"], indices=numbers)]
    question = (
        f"user: {'<image>' * len(frames)}{QUESTION.replace('{title}', row['title'] or row['caption'])}\nassistant:"
    )
    inputs = processor(text=[question], images=[frames], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    (text,) = processor.batch_decode(tokens, skip_special_tokens=True)
    return str(text).strip()


def test_a_local_model_captions_as_it_does_alone(manifest: Path, vlm: Path, tmp_path: Path) -> None:
    options = ["--kinds", "short", "--prompts", prompts(tmp_path), "--vlm", vlm, "--dtype", "float32"]
    # Batches of three: two videos of one length of prompt with one of another, and the picture with fewer frames.
    common = ["--in", manifest, "--workers", 1, "--on-missing", "keep"]
    assert stage(*common, "--out", tmp_path / "3.parquet", *options, "--batch-size", 3) == 0
    assert stage(*common, "--out", tmp_path / "1.parquet", *options, "--batch-size", 1) == 0
    rows = rows_of(tmp_path / "3.parquet")
    source = rows_of(manifest)
    assert [row["caption_short"] or "" for row in rows] == [plain_answer(vlm, row, 6) for row in source]
    # The model does see the frames: other frames, other words.
    assert len({row["caption_short"] for row in rows}) == len(rows) == 4
    assert rows == rows_of(tmp_path / "1.parquet")
    config = load_config(CaptionConfig, tmp_path / "prompts.yaml")
    assert rows[0]["caption_model"].startswith(f"transformers:{vlm.name}-")
    assert rows[0]["caption_model"].endswith(f"-float32/{config.fingerprint}")


def test_other_weights_or_prompts_are_another_source(manifest: Path, vlm: Path, tmp_path: Path) -> None:
    names = set()
    out = tmp_path / "o.parquet"
    for folder, frames in ((vlm, 2), (vlm, 1), (write_tiny_vlm(tmp_path / vlm.name, seed=1), 1)):
        options = ["--kinds", "short", "--prompts", prompts(tmp_path, frames=frames), "--on-missing", "keep"]
        assert stage("--in", manifest, "--out", out, *options, "--vlm", folder) == 0
        names.add(rows_of(out)[0]["caption_model"])
    assert len(names) == 3


def test_a_clip_that_cannot_be_read_is_a_dropped_row(manifest: Path, vlm: Path, tmp_path: Path) -> None:
    rows = rows_of(manifest)
    rows[1]["source"] = str(tmp_path / "gone.mp4")
    write_manifest(table_from_rows(rows), tmp_path / "m.parquet")
    options = ["--kinds", "short", "--prompts", prompts(tmp_path), "--vlm", vlm]
    assert stage("--in", tmp_path / "m.parquet", "--out", tmp_path / "o.parquet", *options) == 0
    reason = rows_of(tmp_path / "o.parquet")[1]["drop_reason"]
    assert reason == f"no caption: short: unreadable: {tmp_path / 'gone.mp4'}: no such file"


def test_what_is_no_model_is_refused(manifest: Path, vlm: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--in", manifest, "--out", tmp_path / "o.parquet", "--kinds", "short"]
    assert stage(*common, "--vlm", tmp_path) == 2
    assert "no model folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert stage(*common, "--vlm", tmp_path) == 2
    assert f"--vlm {tmp_path} cannot be loaded" in capsys.readouterr().err
    weights = load_file(vlm / "model.safetensors")
    shutil.copytree(vlm, tmp_path / "half")
    save_file(dict(list(weights.items())[1:]), tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    assert stage(*common, "--vlm", tmp_path / "half") == 2
    assert "the weights lack 1 tensors, such as lm_head.weight" in capsys.readouterr().err
    assert stage(*common) == 2
    assert "need a source" in capsys.readouterr().err
    assert stage(*common, "--vlm", vlm, "--prompts", prompts(tmp_path, prompts={})) == 2
    assert "no prompt for short" in capsys.readouterr().err
    assert stage(*common, "--vlm", vlm, "--prompts", prompts(tmp_path, frames=0)) == 2
    assert "frames=0" in capsys.readouterr().err
    assert not (tmp_path / "o.parquet").exists()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_captions_from_every_kind_of_file(manifest: Path, tmp_path: Path, suffix: str) -> None:
    rows = rows_of(manifest)
    long = "word " * 2000
    records = [
        {"clip_id": rows[0]["clip_id"], "path": None, "short": "by id", "dense": long},
        {"clip_id": None, "path": rows[1]["source"], "short": "by, path", "dense": "红色"},
        {"clip_id": None, "path": rows[2]["source"], "short": "only short", "dense": None},
        {"clip_id": "unknown", "path": None, "short": "of no clip", "dense": None},
    ]
    file = tmp_path / f"captions.{suffix}"
    _write(file, records)
    common = ["--in", manifest, "--captions", file, "--kinds", "short,dense"]
    assert stage(*common, "--out", tmp_path / "drop.parquet") == 0
    dropped = [row["drop_reason"] for row in rows_of(tmp_path / "drop.parquet")]
    assert dropped == [
        None,
        None,
        "no caption: dense: not in the file",
        "no caption: short: not in the file; dense: not in the file",
    ]
    assert stage(*common, "--out", tmp_path / "keep.parquet", "--on-missing", "keep", "--use", "dense=3,short=1") == 0
    kept = rows_of(tmp_path / "keep.parquet")
    assert [row["caption_short"] for row in kept] == ["by id", "by, path", "only short", None]
    assert [row["caption_dense"] for row in kept] == [long.strip(), "红色", None, None]
    # Where the kind that was drawn is missing, another of the mix is taken; where all are, the old one stays.
    assert [row["caption"] for row in kept[2:]] == ["only short", "a picture"]
    assert [row["caption_kind"] for row in kept[2:]] == ["short", None]


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    elif file.suffix == ".csv":
        with open(file, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"short": "a"}'], "entry 1 has neither clip_id nor path"),
        (['{"path": "a", "short": "a"}', '{"path": "a", "short": "b"}'], "entry 2 gives .*another short caption"),
        (["{"], "line 1 is not JSON"),
    ],
)
def test_a_wrong_file_is_refused(manifest: Path, tmp_path: Path, lines: list[str], complaint: str) -> None:
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=complaint):
        main(["caption", "--in", str(manifest), "--out", str(tmp_path / "o"), "--captions", str(tmp_path / "c.jsonl")])


# --- which caption --------------------------------------------------------------------------------------------------


def test_titles_need_no_source_and_are_cleaned(manifest: Path, tmp_path: Path) -> None:
    rows = rows_of(manifest)
    rows[0]["title"] = "Cats &amp; dogs\n\t— see https://example.org/x?y now \x07"
    rows[1]["title"], rows[1]["caption"] = None, "e\u0301te\u0301"
    rows[2]["title"], rows[2]["caption"] = None, None
    write_manifest(table_from_rows(rows), tmp_path / "m.parquet")
    assert stage("--in", tmp_path / "m.parquet", "--out", tmp_path / "o.parquet", "--kinds", "title") == 0
    out = rows_of(tmp_path / "o.parquet")
    assert [row["caption_title"] for row in out] == ["Cats & dogs — see now", "été", None, "a picture"]
    assert out[2]["drop_reason"] == "no caption: it has no title"
    # A title is what the clip came with, also after a model's caption took its place.
    again = {**out[1], "caption": "a model's words", "caption_kind": "dense"}
    assert original_title(again) == "été"
    config = load_config(CaptionConfig, DEFAULT_PROMPTS)
    assert "may be wrong: été" in prompt_text(config.prompts["dense"], again)
    assert "may be wrong: none" in prompt_text(config.prompts["dense"], dict.fromkeys(SCHEMA.names))


def test_a_mix_gives_each_kind_its_share_and_a_clip_always_the_same() -> None:
    mix = CaptionMix("dense=0.6,short=0.3,title=0.1")
    drawn = [mix.order(f"clip{number}")[0] for number in range(4000)]
    # Four standard deviations of a share of 4000 draws are 0.031.
    assert Counter(drawn)["dense"] / 4000 == pytest.approx(0.6, abs=0.031)
    assert Counter(drawn)["title"] / 4000 == pytest.approx(0.1, abs=0.019)
    assert drawn == [CaptionMix("dense=6,short=3,title=1").order(f"clip{number}")[0] for number in range(4000)]
    assert set(mix.order("a")) == {"dense", "short", "title"}
    assert CaptionMix("short").order("a") == ["short"]


@pytest.mark.parametrize("text", ["long", "dense=0", "dense=-1,short=2", "dense=a", "dense,dense", "", "dense=nan"])
def test_a_wrong_mix_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--use"):
        CaptionMix(text)


def test_wrong_kinds_are_refused() -> None:
    for kinds in (("long",), (), ("short", "short")):
        with pytest.raises(UserError, match="--kinds"):
            caption.CaptionSettings(kinds)
    with pytest.raises(UserError, match="dense is not among"):
        caption.CaptionSettings(("short",), CaptionMix("dense=1,short=1"))
