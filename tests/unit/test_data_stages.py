"""Stages from raw files to a filtered manifest, each against figures that are known from how the clip was made."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import cli, demo_clips, ingest, run, segment, tag
from data_prep import filter as filter_stage
from data_prep.listing import detect_language
from megatron_video.buckets import CropBox
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, kept_rows, read_manifest
from megatron_video.video_io import read_frames, write_mp4


def texture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A smooth random picture, uint8 [H, W, 3]: flow can follow it, and every seed looks different."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 1, (height // 6, width // 6, 3)).astype(np.float32)
    picture = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * rng.uniform(80, 200, 3)
    return np.clip(picture + 40, 0, 255).astype(np.uint8)


def panned(seed: int, frames: int, pixels: int = 2) -> np.ndarray:
    """The texture moving to the left by `pixels` a frame, uint8 [T, 96, 128, 3]."""
    wide = texture(seed, width=6 * (22 + pixels * frames))
    return np.stack([wide[:, t * pixels : t * pixels + 128] for t in range(frames)])


def clip_folder(folder: Path, clips: dict[str, np.ndarray], crf: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frames in clips.items():
        write_mp4(folder / f"{name}.mp4", frames, fps=24, crf=crf)
        (folder / f"{name}.txt").write_text(f"clip {name}", encoding="utf-8")
    return folder


def data(*arguments: object) -> int:
    return run_command(cli.main, [str(argument) for argument in arguments])


def rows_of(manifest: Path) -> list[Row]:
    rows: list[Row] = read_manifest(manifest).to_pylist()
    return rows


# --- demo clips -----------------------------------------------------------------------------------------------------


def test_demo_clips_are_balanced_real_and_the_same_for_a_seed(tmp_path: Path) -> None:
    plan = demo_clips.plan_clips(360, seed=3)
    for words in (demo_clips.COLOURS, demo_clips.DIRECTIONS, demo_clips.SHAPES):
        chinese = [demo_clips.CHINESE[word] for word in words]
        plain = [clip for clip in plan if len(clip.scenes) == 1 and clip.path.endswith(".mp4")]
        counts = [sum(e in c.caption or z in c.caption for c in plain) for e, z in zip(words, chinese, strict=True)]
        assert sum(counts) == len(plain)
        assert max(counts) - min(counts) <= 0.15 * len(plain)
    demo_clips.make_demo_clips(tmp_path / "a", 24, seed=3)
    demo_clips.make_demo_clips(tmp_path / "b", 24, seed=3, workers=2)
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert sum(path.suffix == ".mp4" for path in files) == 20


def test_demo_shapes_stay_whole_and_move_as_captioned() -> None:
    for clip in demo_clips.plan_clips(96, seed=1):
        for scene in clip.scenes:
            frames = demo_clips.render(scene).astype(int)
            mask = np.abs(frames - scene.background).max(axis=-1) > 20
            assert not mask[:, [0, -1]].any()
            assert not mask[:, :, [0, -1]].any()
            areas = mask.sum(axis=(1, 2))
            assert areas.min() > 0.85 * areas.max() > 100
            if scene.num_frames > 1:
                first, last = (np.argwhere(m).mean(axis=0)[::-1] for m in (mask[0], mask[-1]))
                step = (last - first) / (scene.num_frames - 1)
                assert step == pytest.approx(scene.velocity, abs=0.1)
                side = scene.width if abs(step[0]) > abs(step[1]) else scene.height
                assert 0.25 < np.abs(step).max() * 16 / side < 0.5


def test_demo_folder_that_holds_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert data("make-demo-clips", "--out", tmp_path, "--clips", 24) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert data("make-demo-clips", "--out", tmp_path / "x", "--clips", 3) == 2


# --- ingest ---------------------------------------------------------------------------------------------------------


def test_ingest_reads_every_kind_of_caption(tmp_path: Path) -> None:
    clips = {name: panned(number, 6) for number, name in enumerate(["a", "b", "c", "d", "e"])}
    folder = clip_folder(tmp_path / "in", clips)
    (folder / "a.txt").write_text("红色 circle\n", encoding="utf-8")
    (folder / "b.txt").unlink()
    (folder / "b.json").write_text(json.dumps({"caption": "from json", "language": "fr"}))
    (folder / "c.txt").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "d.mp4", "text": "from the listing"}) + "\n")
    assert data("ingest", "--in", folder, "--out", tmp_path / "m.parquet", "--workers", 1) == 0
    found = {Path(row["source"]).stem: row for row in rows_of(tmp_path / "m.parquet")}
    captions = {name: (row["caption"], row["language"]) for name, row in found.items() if not row["dropped_by"]}
    assert captions == {
        "a": ("红色 circle", "zh"),
        "b": ("from json", "fr"),
        "d": ("from the listing", "en"),
        "e": ("clip e", "en"),
    }
    assert found["c"]["dropped_by"] == "ingest"
    assert found["c"]["drop_reason"].startswith("no caption")
    assert (found["a"]["end_frame"], found["a"]["width"], found["a"]["height"], found["a"]["fps"]) == (6, 128, 96, 24)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_ingest_reads_every_kind_of_listing(tmp_path: Path, suffix: str) -> None:
    clip_folder(tmp_path, {"a": panned(0, 4), "b": panned(1, 4), "unlisted": panned(2, 4)})
    records = [{"path": "a.mp4", "caption": "one, two"}, {"path": str(tmp_path / "b.mp4"), "caption": "蓝色方块"}]
    listing = tmp_path / f"any-name.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), listing)
    elif suffix == "csv":
        with open(listing, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["path", "caption"])
            writer.writeheader()
            writer.writerows(records)
    else:
        listing.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    ingest.run(listing, tmp_path / "m.parquet")
    assert [row["caption"] for row in rows_of(tmp_path / "m.parquet")] == ["one, two", "蓝色方块"]


def test_what_a_folder_scan_passes_over_is_counted(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "in", {"a": panned(1, 4)})
    for name in ("notes.MD", "more.md", ".hidden.mp4", "README"):
        (folder / name).write_text("no video")
    (folder / "loop").symlink_to(folder)
    report = ingest.run(folder, tmp_path / "m.parquet")
    assert (report.rows_in, report.kept) == (1, 1)
    assert report.details["passed over"] == {".md": 2, "hidden": 1, "links to folders": 1, "no suffix": 1}


def test_copies_of_a_file_are_dropped(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "in", {"a": panned(0, 4), "b": panned(0, 4), "c": panned(1, 4)})
    report = ingest.run(folder, tmp_path / "m.parquet")
    assert (report.kept, report.reasons) == (2, {"copy": 1})


def test_languages() -> None:
    texts = {"a red circle": "en", "蓝色方块向上移动": "zh", "3D 方块": "zh", "123 !?": "und", "": "und"}
    assert {text: detect_language(text) for text in texts} == texts


# --- segment --------------------------------------------------------------------------------------------------------


def test_segment_finds_the_cut_at_the_right_frame(tmp_path: Path) -> None:
    tints = [(1, 0.3, 0.3), (0.3, 1, 0.3), (0.3, 0.3, 1)]
    pans = [panned(1, 31, 1), panned(2, 40, 1), panned(3, 20, 1)]
    scenes = [(pan * np.array(tint)).astype(np.uint8) for pan, tint in zip(pans, tints, strict=True)]
    folder = clip_folder(tmp_path / "in", {"cut": np.concatenate(scenes), "whole": panned(4, 30)})
    ingest.run(folder, tmp_path / "1.parquet")
    report = segment.run(tmp_path / "1.parquet", tmp_path / "2.parquet")
    rows = rows_of(tmp_path / "2.parquet")
    spans = [(Path(row["source"]).stem, row["start_frame"], row["end_frame"]) for row in rows]
    assert spans == [("cut", 3, 28), ("cut", 34, 68), ("cut", 74, 88), ("whole", 3, 27)]
    # 14 of the last scene's 20 frames are left, less than 17.
    assert [row["dropped_by"] for row in rows] == [None, None, "segment", None]
    assert (report.kept, report.reasons) == (3, {"too short": 1})
    assert len({row["clip_id"] for row in rows}) == 4
    assert rows[1]["start_time"] == pytest.approx(34 / 24)
    frames = read_frames(rows[1]["source"], 34, 34).astype(int)
    assert np.abs(frames - scenes[1][3:37]).mean() < 4


def test_segment_drops_a_video_that_is_damaged_inside(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "in", {"good": panned(1, 30), "rotten": panned(2, 60)})
    path = folder / "rotten.mp4"
    content = bytearray(path.read_bytes())
    # Behind the first frame, which ingest decodes.
    damaged = int(len(content) * 0.8)
    content[damaged : damaged + 2000] = bytes(2000)
    path.write_bytes(content)
    ingest.run(folder, tmp_path / "1.parquet")
    report = segment.run(tmp_path / "1.parquet", tmp_path / "2.parquet", workers=2)
    assert (report.kept, report.reasons) == (1, {"unreadable": 1})


# --- tag ------------------------------------------------------------------------------------------------------------


def tags_of(tmp_path: Path, frames: np.ndarray, crf: int = 2) -> dict[str, Any]:
    ingest.run(clip_folder(tmp_path / "in", {"clip": frames}, crf), tmp_path / "1.parquet")
    tag.run(tmp_path / "1.parquet", tmp_path / "2.parquet")
    (row,) = kept_rows(read_manifest(tmp_path / "2.parquet"))
    return row


def test_motion_of_two_pixels_a_frame(tmp_path: Path) -> None:
    row = tags_of(tmp_path, panned(5, 24, pixels=2))
    # The unit is a picture of 256 pixels on the long side; this one has 128.
    assert row["motion_mean"] == pytest.approx(4, rel=0.1)
    assert row["motion_min"] <= row["motion_mean"] <= row["motion_max"] < 5
    still = tags_of(tmp_path / "still", np.repeat(panned(5, 1), 24, axis=0))
    assert still["motion_max"] < 0.05


def test_motion_is_the_same_for_a_larger_picture() -> None:
    wide = cv2.resize(texture(6, 144, 192), (650, 480), interpolation=cv2.INTER_CUBIC)
    large = [np.ascontiguousarray(wide[:, start : start + 640]) for start in (0, 10)]
    small = [cv2.resize(picture, (128, 96), interpolation=cv2.INTER_AREA) for picture in large]
    # 10 of 640 pixels are 4 of 256.
    assert tag.motion(large[0], large[1]) == pytest.approx(4, rel=0.1)
    assert tag.motion(small[0], small[1]) == pytest.approx(4, rel=0.1)


def test_black_borders_are_boxed_and_left_out_of_the_other_tags(tmp_path: Path) -> None:
    inner = panned(7, 20)[:, :72, :100]
    row = tags_of(tmp_path, np.pad(inner, ((0, 0), (14, 10), (8, 20), (0, 0))))
    assert [row[f"crop_{side}"] for side in ("x", "y", "width", "height")] == [8, 14, 100, 72]
    assert row["border_share"] == pytest.approx(1 - 72 * 100 / (96 * 128), abs=1e-5)
    plain = tags_of(tmp_path / "plain", inner)
    assert row["brightness"] == pytest.approx(plain["brightness"], abs=1)
    assert plain["border_share"] == 0


def test_an_all_black_clip_has_no_border(tmp_path: Path) -> None:
    assert tag.crop_box(np.zeros((3, 64, 96, 3), np.uint8)) == CropBox(0, 0, 96, 64)
    row = tags_of(tmp_path, np.zeros((20, 64, 96, 3), np.uint8))
    assert (row["border_share"], row["brightness"]) == (0, pytest.approx(0, abs=1))


def test_blur_saturation_and_brightness_by_their_definitions() -> None:
    frames = panned(8, 3)
    grey = np.rint(frames @ np.array([0.299, 0.587, 0.114]))
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    centre = padded[:, 1:-1, 1:-1]
    laplacian = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:] - 4 * centre
    assert tag.blur(frames) == pytest.approx(laplacian.var(axis=(1, 2)).mean(), rel=0.02)
    high, low = frames.max(axis=-1).astype(float), frames.min(axis=-1).astype(float)
    saturation, brightness = tag.saturation_and_brightness(frames)
    assert saturation == pytest.approx((255 * (high - low) / np.maximum(high, 1)).mean(axis=(1, 2)), abs=0.5)
    assert brightness == pytest.approx(high.mean(axis=(1, 2)), abs=0.01)
    assert tag.blur(np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in frames])) < 0.3 * tag.blur(frames)


def test_sampled_frames_are_uniform_and_have_successors() -> None:
    assert tag.sampled_frames(3, 20) == [3, 5, 7, 9, 12, 14, 16, 18] == sorted(tag.sampled_frames(3, 20))
    assert tag.sampled_frames(0, 2) == [0]
    assert tag.sampled_frames(0, 1) == [0]


# --- filter ---------------------------------------------------------------------------------------------------------


def test_filter_drops_by_rule_and_reports_each(tmp_path: Path) -> None:
    clips = {"fast": panned(1, 24, 4), "slow": panned(2, 24, 1), "still": np.repeat(panned(3, 1), 24, axis=0)}
    clips["dark"] = clips["fast"][:, ::-1] // 16
    run.run(clip_folder(tmp_path / "in", clips), tmp_path)
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{tag: brightness, min: 25}, {tag: motion_mean, min: 3, max: 50, media: videos}]")
    assert data("filter", "--in", tmp_path / "tagged.parquet", "--out", tmp_path / "out.parquet", "--rules", rules) == 0
    reasons = {Path(row["source"]).stem: row["drop_reason"] for row in rows_of(tmp_path / "out.parquet")}
    assert reasons["fast"] is None
    assert reasons["slow"].startswith("motion_mean: 1.9")
    assert reasons["slow"].endswith("is outside [3..50]")
    assert reasons["still"].startswith("motion_mean: ")
    assert reasons["dark"].startswith("brightness: ")
    report = filter_stage.run(tmp_path / "tagged.parquet", tmp_path / "out.parquet", rules)
    assert report.up_to_date
    assert (report.kept, report.reasons) == (1, {"motion_mean": 2, "brightness": 1})
    # The dark clip moves too, but its contrast is too low to fail by motion; it counts under one rule only.
    assert report.details["fails brightness [25..]"] == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rules: [{tag: sharpness, min: 1}]", "sharpness"),
        ("rules: [{tag: blur}]", "neither min nor max"),
        ("rules: [{tag: blur, min: 3, max: 1}]", "min=3.0 is above max=1.0"),
        ("rules: [{tag: blur, least: 3}]", "least"),
        ("rules: [{tag: motion_mean, min: 1}]", "run `megatron-video data tag` first"),
    ],
)
def test_wrong_rules_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str) -> None:
    ingest.run(clip_folder(tmp_path / "in", {"a": panned(1, 6)}), tmp_path / "1.parquet")
    (tmp_path / "rules.yaml").write_text(text)
    out = tmp_path / "2.parquet"
    assert data("filter", "--in", tmp_path / "1.parquet", "--out", out, "--rules", tmp_path / "rules.yaml") == 2
    assert complaint in capsys.readouterr().err
    assert not out.exists()


# --- what all stages share ------------------------------------------------------------------------------------------


def test_a_stage_is_not_redone_and_goes_on_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.stage.PART_ROWS", 2)
    folder = clip_folder(tmp_path / "in", {f"clip{n}": panned(n, 8) for n in range(5)})
    ingest.run(folder, tmp_path / "1.parquet")
    original = (tmp_path / "1.parquet").read_bytes()
    tagged: list[str] = []
    plain = tag._tag_row

    def fails_at_the_fourth(row: Row) -> list[Row]:
        tagged.append(row["source"])
        if len(tagged) == 4:
            raise KeyboardInterrupt
        return plain(row)

    monkeypatch.setattr(tag, "_tag_row", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        tag.run(tmp_path / "1.parquet", tmp_path / "2.parquet")
    assert not (tmp_path / "2.parquet").exists()
    tag.run(tmp_path / "1.parquet", tmp_path / "2.parquet")
    # Four before the stop, and the three clips of the two unfinished parts.
    assert len(tagged) == 7
    monkeypatch.setattr(tag, "_tag_row", plain)
    tag.run(tmp_path / "1.parquet", tmp_path / "3.parquet")
    assert rows_of(tmp_path / "2.parquet") == rows_of(tmp_path / "3.parquet")
    assert tag.run(tmp_path / "1.parquet", tmp_path / "2.parquet").up_to_date
    assert (tmp_path / "1.parquet").read_bytes() == original
    assert not list(tmp_path.glob(".*"))


def test_output_that_is_the_input_or_not_a_manifest_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest.run(clip_folder(tmp_path / "in", {"a": panned(1, 6)}), tmp_path / "1.parquet")
    assert data("tag", "--in", tmp_path / "1.parquet", "--out", tmp_path / "1.parquet") == 2
    assert "never edits its input" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("keep me")
    assert data("tag", "--in", tmp_path / "1.parquet", "--out", tmp_path / "notes.txt") == 2
    assert "not a manifest" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_places_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest.run(clip_folder(tmp_path / "in", {"a": panned(1, 6)}), tmp_path / "1.parquet")
    (tmp_path / "file").touch()
    for command, complaint in (
        (["tag", "--out", tmp_path / "file" / "2.parquet"], f"{tmp_path}/file cannot be written"),
        (["tag", "--out", tmp_path], "is a folder; name the file"),
        (["filter", "--out", tmp_path / "2.parquet", "--report", tmp_path / "file"], "--report .*/file cannot be made"),
        (["run", "--work", tmp_path / "file"], f"{tmp_path}/file cannot be written"),
    ):
        assert data(*command, "--in", tmp_path / ("in" if command[0] == "run" else "1.parquet")) == 2
        assert re.search(complaint, capsys.readouterr().err), command
    assert not (tmp_path / "2.parquet").exists()


def test_what_is_no_manifest_and_no_folder_of_media_is_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clip_folder(tmp_path / "in", {"a": panned(1, 6)})
    assert data("tag", "--in", folder, "--out", tmp_path / "2.parquet") == 2
    assert "is a folder, no manifest; `megatron-video data ingest` makes one of it" in capsys.readouterr().err
    assert data("ingest", "--in", folder / "a.mp4", "--out", tmp_path / "1.parquet") == 2
    assert "a.mp4 is a single video or image; give its folder" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "a.txt").touch())])
def test_a_folder_without_videos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any) -> None:
    make(tmp_path / "in")
    assert data("ingest", "--in", tmp_path / "in", "--out", tmp_path / "m.parquet") == 2
    assert str(tmp_path / "in") in capsys.readouterr().err
    assert not (tmp_path / "m.parquet").exists()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"path": "a.mp4", "caption": "x"}', '{"path": "gone.mp4"}', '{"path": "lost.mp4"}'], "gone.mp4, .*lost.mp4"),
        (["{"], "line 1 is not JSON"),
        (['{"caption": "x"}'], "entry 1 has no path.*there are: 'caption'"),
        (['{"path": "a.mp4", "caption": ["x", "y"]}'], "entry 1: caption is .*not a text"),
        (["[1]"], "entry 1 is not an object"),
        ([], "empty"),
        (['{"path": "a.mp4", "caption": "x"}', '{"path": "a.mp4", "caption": "y"}'], "two captions"),
    ],
)
def test_a_wrong_listing_is_refused(tmp_path: Path, lines: Sequence[str], complaint: str) -> None:
    clip_folder(tmp_path, {"a": panned(1, 4)})
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for source in (tmp_path, tmp_path / "captions.jsonl"):
        with pytest.raises(UserError, match=complaint):
            ingest.run(source, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


def test_a_csv_whose_captions_have_commas_without_quotes_is_refused(tmp_path: Path) -> None:
    clip_folder(tmp_path, {"a": panned(1, 4)})
    listing = tmp_path / "captions.csv"
    listing.write_text("path,caption\na.mp4,a dog, a cat\n")
    with pytest.raises(UserError, match=r"captions.csv: entry 1 has more fields .*quotes"):
        ingest.run(listing, tmp_path / "m.parquet")
    listing.write_text('path,caption\na.mp4,"a dog, a cat"\n')
    assert ingest.run(listing, tmp_path / "m.parquet").kept == 1
    assert read_manifest(tmp_path / "m.parquet")["caption"].to_pylist() == ["a dog, a cat"]


def test_unknown_stages_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert data("--help") == 0
    listed = capsys.readouterr().out
    assert all(stage in listed for stage in cli.STAGES)
    assert data("ingets") == 2
    assert "'ingets'" in capsys.readouterr().err
    for stage in cli.STAGES:
        with pytest.raises(SystemExit) as stopped:
            data(stage, "--help")
        assert stopped.value.code == 0
