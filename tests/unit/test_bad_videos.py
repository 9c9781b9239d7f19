"""Every nasty file becomes rows that say what it is, or a dropped row that says why; none stops a run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from nasty_folder import FILES, LONG_CAPTION, Fate, make_nasty_folder
from nasty_videos import CODECS, cut_short, numbers_of, scenes, write_video

from data_prep import ingest, segment, tag
from megatron_video.manifest import Row, read_manifest
from megatron_video.video_io import VideoError, probe, read_frames


class Chain:
    """The nasty folder behind ingest, segment and tag."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "in"
        self.fates = make_nasty_folder(self.folder)
        self.manifests = [work / f"{number}.parquet" for number in range(3)]
        self.reports = [
            ingest.run(self.folder, self.manifests[0]),
            segment.run(self.manifests[0], self.manifests[1]),
            tag.run(self.manifests[1], self.manifests[2]),
        ]

    def rows(self, name: str, stage: int = 0) -> list[Row]:
        source = str((self.folder / name).absolute())
        rows: list[Row] = [row for row in self.all_rows(stage) if row["source"] == source]
        return rows

    def all_rows(self, stage: int) -> list[Row]:
        rows: list[Row] = read_manifest(self.manifests[stage]).to_pylist()
        return rows


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("nasty"))


@pytest.mark.parametrize("name", FILES)
def test_fate(chain: Chain, name: str) -> None:
    fate: Fate = FILES[name][1]
    (row,) = chain.rows(name)
    clips = chain.rows(name, stage=1)
    assert (row["caption"] or "") == fate.caption or fate.reason.startswith("sidecar")
    if fate.dropped_by:
        (gone,) = clips
        assert gone["dropped_by"] == fate.dropped_by
        assert gone["drop_reason"].startswith(fate.reason)
        return
    kept = [clip for clip in clips if not clip["dropped_by"]]
    if fate.clips:
        assert tuple((clip["start_frame"], clip["end_frame"]) for clip in kept) == fate.clips
    for clip in kept:
        # What the manifest says can be read, and is upright.
        frames = read_frames(clip["source"], clip["start_frame"], clip["end_frame"] - clip["start_frame"])
        assert frames.shape[1:] == (clip["height"], clip["width"], 3)
    assert all(row["blur"] is not None for row in chain.rows(name, stage=2) if not row["dropped_by"])


def test_nothing_is_lost_and_ids_are_unique(chain: Chain) -> None:
    assert {row["source"] for row in chain.all_rows(0)} == set(chain.fates)
    ids = [row["clip_id"] for row in chain.all_rows(2) if not row["dropped_by"]]
    assert len(ids) == len(set(ids)) > 30
    assert chain.reports[2].dropped_here == 0
    assert all(row["drop_reason"] for row in chain.all_rows(2) if row["dropped_by"])


def test_unreadable_files_say_what_is_wrong(chain: Chain) -> None:
    expected = {
        "broken/truncated.mp4": "cut short",
        "broken/truncated.mkv": "cut short: the header promises 2.50 s",
        "broken/truncated.avi": "cut short",
        "broken/zero.mp4": "empty (0 bytes)",
        "broken/text.mp4": "Invalid data",
        "broken/sound only.mp4": "no video stream",
        "pictures/animation.webp": "animated WEBP",
        "pictures/animation.avif": "animated AVIF",
        "captions/broken.mp4": "cannot be read",
    }
    for name, words in expected.items():
        assert words in chain.rows(name)[0]["drop_reason"]


def test_what_probing_says(chain: Chain) -> None:
    def told(name: str, *columns: str) -> tuple[object, ...]:
        (row,) = chain.rows(name)
        return tuple(row[column] for column in columns)

    assert told("variable.mp4", "variable_fps", "end_frame") == (True, 60)
    assert told("a/clip.mp4", "variable_fps", "fps", "duration", "audio") == (False, 24, 2.5, False)
    assert told("phone/rotated.mov", "rotation", "width", "height") == (90, 72, 96)
    assert told("phone/hdr.mp4", "hdr", "color_transfer", "pixel_format") == (True, "smpte2084", "yuv420p10le")
    assert told("codecs/hevc-10-bit.mkv", "hdr", "codec", "pixel_format") == (False, "hevc", "yuv420p10le")
    assert told("sound/Ünïcode 一个 🎬 'quoted'.mp4", "audio", "title") == (True, "Titel 标题")
    assert told("odd/odd.webm", "width", "height") == (97, 73)
    assert told("pictures/turned.jpg", "is_image", "width", "height", "codec") == (True, 71, 95, "mjpeg")
    assert told("renamed/picture.mp4", "is_image", "duration") == (True, 0)
    assert told("renamed/video.jpg", "is_image", "codec") == (False, "h264")
    assert told("captions/long.mp4", "caption") == (LONG_CAPTION,)
    assert told("b/copy.mp4", "drop_reason") == (f"copy: same bytes as {chain.folder / 'b' / 'clip.mp4'}",)


def test_a_fade_in_the_chain_is_a_dropped_row(chain: Chain) -> None:
    reasons = [row["drop_reason"] for row in chain.rows("b/fade.mp4", stage=1)]
    assert [bool(reason) for reason in reasons] == [False, True, False]
    assert reasons[1].startswith("black: ")


def test_ids_do_not_depend_on_names_or_places(chain: Chain, tmp_path: Path) -> None:
    for number, name in enumerate(("b/clip.mp4", "codecs/vp9.webm", "pictures/plain.png")):
        source = chain.folder / name
        path = tmp_path / "moved" / f"{number} другое имя{source.suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())
        path.with_suffix(".txt").write_text("another caption")
        ingest.run(path.parent, tmp_path / f"{number}.parquet")
        ids = read_manifest(tmp_path / f"{number}.parquet")["clip_id"].to_pylist()
        assert chain.rows(name)[0]["clip_id"] in ids


def test_uncaptioned_files_are_kept_where_a_model_is_to_write_the_captions(chain: Chain, tmp_path: Path) -> None:
    report = ingest.run(chain.folder / "captions", tmp_path / "m.parquet", uncaptioned=True)
    rows = {Path(row["source"]).stem: row for row in read_manifest(tmp_path / "m.parquet").to_pylist()}
    assert report.kept == 3
    assert rows["none"]["caption"] is rows["empty"]["caption"] is None
    assert rows["broken"]["dropped_by"] == "ingest"


def test_names_and_texts_that_no_table_can_hold(chain: Chain, tmp_path: Path) -> None:
    content = (chain.folder / "a" / "clip.mp4").read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(content)
    (folder / "broken link.mp4").symlink_to(folder / "gone.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "half.mp4").write_bytes(content)
    (folder / "half.json").write_text('{"caption": "half \\ud83c a character, a whole \\ud83c\\udfac"}')
    (folder / "latin.png").write_bytes((chain.folder / "pictures" / "plain.png").read_bytes())
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    ingest.run(folder, tmp_path / "m.parquet")
    rows = {Path(row["source"]).name: row for row in read_manifest(tmp_path / "m.parquet").to_pylist()}
    assert rows["half.mp4"]["caption"] == "half \ufffd a character, a whole 🎬"
    reasons = {name: row["drop_reason"] for name, row in rows.items() if name != "half.mp4"}
    assert reasons["caf\\xe9.mp4"].startswith("name: ")
    assert reasons["broken link.mp4"].startswith("unreadable: ")
    assert reasons["pipe.mp4"].startswith("unreadable: ")
    assert reasons["latin.png"].startswith("sidecar: latin.txt cannot be read")
    assert ingest.run(folder, tmp_path / "m.parquet").up_to_date


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.85])
def test_matroska_cut_anywhere_is_refused_by_its_own_duration(tmp_path: Path, share: float) -> None:
    whole = write_video(tmp_path / "whole.webm", scenes([72], 72, 96), CODECS["vp9"])
    assert probe(whole).num_frames == 72
    with pytest.raises(VideoError, match=r"cut\.webm"):
        probe(cut_short(whole, tmp_path / "cut.webm", share))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_clips_are_upright_behind_a_seek_too(tmp_path: Path, degrees: int) -> None:
    frames = scenes([100], 72, 96)
    path = write_video(tmp_path / "turned.mov", frames, rotation=degrees)
    turned = np.rot90(frames[80:83], degrees // 90, axes=(1, 2))
    ours = read_frames(path, 80, 3)
    assert ours.shape == turned.shape
    assert np.abs(ours.astype(int) - turned).mean() < 8
    assert np.abs(np.array(numbers_of(np.rot90(ours, -degrees // 90, axes=(1, 2)))) - np.arange(80, 83)).max() <= 1


def test_damage_anywhere_costs_one_clip_and_never_the_run(chain: Chain, tmp_path: Path) -> None:
    """Random bytes, overwritten stretches and cuts in every kind of file: each ends as rows."""
    rng = np.random.default_rng(0)
    originals = [path for path in sorted((chain.folder / "codecs").iterdir()) if path.suffix != ".txt"]
    originals += [chain.folder / "pictures" / name for name in ("plain.png", "turned.jpg", "animation.gif")]
    for number in range(120):
        original = originals[number % len(originals)]
        content = bytearray(original.read_bytes())
        if number % 3 == 0:
            content = content[: int(rng.integers(1, len(content)))]
        start = int(rng.integers(len(content) if number % 2 else min(600, len(content))))
        content[start : start + 200] = rng.bytes(int(rng.integers(1, 200)))
        path = tmp_path / "in" / f"{number:03d}{original.suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text("a caption")
    ingested = ingest.run(path.parent, tmp_path / "1.parquet")
    segmented = segment.run(tmp_path / "1.parquet", tmp_path / "2.parquet")
    assert ingested.rows_in == ingested.kept + ingested.dropped_here == 120
    assert ingested.dropped_here > 30
    assert set(ingested.reasons) == {"unreadable"}
    assert segmented.dropped_before == ingested.dropped_here
    assert segmented.reasons["unreadable"] > 5
