"""Cuts, fades, lengths and times of clips, against how the videos were made; re-encoded clips against their spans."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_videos import CODECS, faded, numbered, numbers_of, scenes, write_video

from data_prep import ingest, segment
from data_prep.scenes import split_evenly
from data_prep.segment import SegmentSettings
from megatron_video.errors import UserError
from megatron_video.manifest import Row, read_manifest
from megatron_video.video_io import probe, read_frames
from megatron_video.video_probe import frame_times

MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from data_prep import ingest, segment
folder = Path(sys.argv[1])
ingest.run(folder / "in", folder / "1.parquet")
settings = segment.SegmentSettings(max_seconds=float(sys.argv[2]))
report = segment.run(folder / "1.parquet", folder / "2.parquet", settings=settings)
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(report.kept, report.rows_in, int(peak[1]) / 1024)
"""


def segmented(tmp_path: Path, video: Path, **options: Any) -> list[Row]:
    """Rows of one captioned video."""
    video.with_suffix(".txt").write_text("a caption")
    ingest.run(video.parent, tmp_path / "1.parquet")
    segment.run(tmp_path / "1.parquet", tmp_path / "2.parquet", settings=SegmentSettings(**options))
    rows: list[Row] = read_manifest(tmp_path / "2.parquet").to_pylist()
    return rows


def spans_of(rows: list[Row]) -> list[tuple[int, int]]:
    return [(row["start_frame"], row["end_frame"]) for row in rows if not row["dropped_by"]]


@pytest.mark.parametrize("name", CODECS)
def test_cuts_are_exact_in_every_codec_and_so_are_the_frames_behind_them(tmp_path: Path, name: str) -> None:
    codec = CODECS[name]
    frames = scenes([41, 54, 67], 72, 96)
    rows = segmented(tmp_path, write_video(tmp_path / "in" / f"clip{codec.suffix}", frames, codec))
    assert spans_of(rows) == [(3, 38), (44, 92), (98, 159)]
    assert rows[2]["start_time"] == pytest.approx(98 / 24, abs=0.001)
    assert rows[2]["end_time"] == pytest.approx(159 / 24, abs=0.002)
    shown = read_frames(rows[2]["source"], 98, 61)
    assert np.abs(np.array(numbers_of(shown)) - np.arange(98, 159)).max() <= 2
    # The picture too, not only its number.
    assert np.abs(shown[:, :48].astype(int) - frames[98:159, :48]).mean() < 8


def test_a_fade_ends_a_scene_and_the_black_between_is_dropped(tmp_path: Path) -> None:
    one, two = scenes([70], seed=1), scenes([110], seed=2)
    frames = faded(np.concatenate([one, two]), start=65, black=40, end=119, ramp=14)
    rows = segmented(tmp_path, write_video(tmp_path / "in" / "fade.mp4", frames))
    (first, black, _) = rows
    assert black["drop_reason"].startswith("black: frames ")
    # The detector's level is reached within two frames of the blackest.
    assert 62 <= black["start_frame"] <= 65
    assert 105 <= black["end_frame"] <= 108
    assert spans_of(rows) == [(3, black["start_frame"] - 3), (black["end_frame"] + 3, 177)]
    assert read_frames(first["source"], 3, first["end_frame"] - 3).mean(axis=(1, 2, 3)).min() > 12
    # For the detector of cuts alone the black is a scene like others.
    without = spans_of(segmented(tmp_path / "cuts", Path(first["source"]), fades=False))
    assert any(start >= 63 and end <= 107 for start, end in without)


def test_black_at_both_ends_is_dropped_and_a_dark_video_is_kept(tmp_path: Path) -> None:
    frames = scenes([90], seed=3)
    frames[:10], frames[-9:] = 0, 0
    rows = segmented(tmp_path, write_video(tmp_path / "in" / "ends.mp4", frames))
    assert spans_of(rows) == [(13, 78)]
    assert [row["dropped_by"] for row in rows] == ["segment", None, "segment"]
    dark = write_video(tmp_path / "night" / "in" / "dark.mp4", (scenes([40], seed=4) // 16))
    assert spans_of(segmented(tmp_path / "night", dark)) == [(3, 37)]


def test_lengths_in_seconds(tmp_path: Path) -> None:
    video = write_video(tmp_path / "in" / "clip.mp4", scenes([30, 130, 60], 72, 96))
    rows = segmented(tmp_path, video, min_seconds=1.25, max_seconds=2.5)
    # 24 frames are 1 s, too short; 124 are 5.17 s, three pieces of 1.72 s; 54 are 2.25 s.
    assert spans_of(rows) == [(33, 74), (74, 116), (116, 157), (163, 217)]
    assert rows[0]["drop_reason"].startswith("too short: 1.00 s of 1.25 s between its ends (frames 0 to 30)")
    assert len({row["clip_id"] for row in rows}) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"min_seconds": -1},
        {"min_seconds": float("nan")},
        {"max_seconds": 0},
        {"max_seconds": float("nan")},
        {"min_seconds": 3, "max_seconds": 2},
    ],
)
def test_lengths_that_contradict_each_other_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="seconds"):
        SegmentSettings(**options)  # type: ignore[arg-type]


@given(
    gaps=st.lists(st.floats(0.01, 0.2), min_size=2, max_size=120),
    limit=st.floats(0.25, 5),
    edges=st.tuples(st.integers(0, 10), st.integers(0, 10)),
)
@settings(max_examples=200, deadline=None)
def test_pieces_cover_the_scene_and_keep_the_limit(gaps: list[float], limit: float, edges: tuple[int, int]) -> None:
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    start, end = min(edges[0], len(gaps) - 1), max(len(gaps) - edges[1], min(edges[0], len(gaps) - 1) + 1)
    spans = split_evenly(times, start, end, limit)
    assert (spans[0][0], spans[-1][1]) == (start, end)
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    lengths = [times[b] - times[a] for a, b in spans]
    assert all(b > a for a, b in spans)
    assert max(lengths) <= limit + 1e-6
    # Evenly: no piece is longer than the shortest by more than what two borders can be off.
    assert max(lengths) - min(lengths) <= 2 * max(gaps) + 1e-6


def test_a_scene_that_just_fits_is_one_piece() -> None:
    assert split_evenly(np.arange(241) / 24, 0, 240, 10.0) == [(0, 240)]
    assert split_evenly(np.arange(242) / 24, 0, 241, 10.0) == [(0, 120), (120, 241)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rates_have_right_frames_and_right_times(tmp_path: Path, suffix: str) -> None:
    times = [0, *np.cumsum(np.random.default_rng(1).integers(1, 5, 139)).tolist()]
    video = write_video(tmp_path / "in" / f"clip{suffix}", scenes([65, 75], 72, 96), times=times)
    rows = segmented(tmp_path, video, max_seconds=4)
    spans = spans_of(rows)
    assert (spans[0][0], spans[-1][1]) == (3, 137)
    assert [end for _, end in spans if end not in [start for start, _ in spans]] == [62, 137]
    assert 68 in [start for start, _ in spans]
    for row in rows:
        assert row["start_time"] == pytest.approx(times[row["start_frame"]] / 24, abs=0.001)
        assert row["end_time"] == pytest.approx(times[row["end_frame"]] / 24, abs=0.001)
        assert row["end_time"] - row["start_time"] <= 4.001
        shown = read_frames(row["source"], row["start_frame"], 5)
        assert np.abs(np.array(numbers_of(shown)) - np.arange(row["start_frame"], row["start_frame"] + 5)).max() <= 2


def test_reencoded_clips_are_files_with_the_same_frames(tmp_path: Path) -> None:
    video = write_video(tmp_path / "in" / "odd.mkv", scenes([45, 40], 73, 97), CODECS["ffv1"])
    spans = segmented(tmp_path / "spans", video)
    rows = segmented(tmp_path, video, reencode=tmp_path / "clips")
    files = sorted((tmp_path / "clips").rglob("*.mp4"))
    assert [Path(row["source"]) for row in rows] == sorted(files, key=lambda file: file.name[25:])
    for span, row in zip(spans, rows, strict=True):
        assert row["clip_id"] == span["clip_id"] == Path(row["source"]).stem
        assert row["origin"] == f"{video}::{span['start_frame']}-{span['end_frame']}"
        count = span["end_frame"] - span["start_frame"]
        assert (row["start_frame"], row["end_frame"], row["width"], row["height"]) == (0, count, 96, 72)
        ours = read_frames(row["source"], 0, count).astype(int)
        theirs = read_frames(video, span["start_frame"], count)[:, :72, :96]
        assert np.abs(ours - theirs).mean() < 5
    written = [file.stat().st_mtime_ns for file in files]
    segmented(tmp_path / "again", video, reencode=tmp_path / "clips")
    assert [file.stat().st_mtime_ns for file in files] == written


def test_reencoded_clips_are_upright_and_8_bit_and_leftovers_of_a_kill_go(tmp_path: Path) -> None:
    frames = scenes([100], 72, 96)
    video = write_video(tmp_path / "in" / "phone.mov", frames, CODECS["prores"], rotation=90)
    (span,) = segmented(tmp_path / "spans", video, max_seconds=10)
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / span["clip_id"][:2]).mkdir()
    (folder / span["clip_id"][:2] / f".{span['clip_id']}.mp4.1.tmp").write_bytes(b"half a file")
    (row,) = segmented(tmp_path, video, max_seconds=10, reencode=folder)
    assert (row["rotation"], row["width"], row["height"], row["pixel_format"]) == (0, 72, 96, "yuv420p")
    assert [file.name for file in folder.rglob("*") if file.is_file()] == [f"{row['clip_id']}.mp4"]
    ours = read_frames(row["source"], 70, 10)
    assert np.abs(ours.astype(int) - np.rot90(frames[73:83], axes=(1, 2))).mean() < 5
    assert np.abs(np.array(numbers_of(np.rot90(ours, -1, axes=(1, 2)))) - np.arange(73, 83)).max() <= 2


def test_reencoding_keeps_the_times_of_a_variable_frame_rate(tmp_path: Path) -> None:
    times = [0, *np.cumsum(np.random.default_rng(2).integers(1, 4, 59)).tolist()]
    video = write_video(tmp_path / "in" / "clip.mp4", scenes([60], 72, 96), times=times)
    (row,) = segmented(tmp_path, video, reencode=tmp_path / "clips")
    assert row["variable_fps"]
    expected = (np.array(times[3:57]) - times[3]) / 24
    assert frame_times(row["source"])[:-1] == pytest.approx(expected, abs=0.001)
    assert probe(row["source"]).num_frames == 54


def test_a_folder_for_reencoded_clips_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    video = write_video(tmp_path / "in" / "clip.mp4", scenes([30], 48, 64))
    with pytest.raises(UserError, match=r"--reencode .*/file"):
        segmented(tmp_path, video, reencode=tmp_path / "file")


def write_long_video(path: Path, seconds: int, fps: int) -> None:
    """Small pictures and a cut every twenty seconds."""
    import av

    pictures = [numbered(scenes([1], 48, 64, seed))[0] for seed in range(5)]
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=fps, options={"g": "300", "q": "3", "flags": "+qscale"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frames = [
            av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p") for picture in pictures
        ]
        for number in range(seconds * fps):
            frame = frames[number // (20 * fps) % len(frames)]
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    path.with_suffix(".txt").write_text("long")


@pytest.mark.parametrize("fps", [pytest.param(2, id="2-fps"), pytest.param(24, id="24-fps", marks=pytest.mark.heavy)])
def test_four_hours_take_the_memory_of_one_minute(tmp_path: Path, fps: int) -> None:
    peaks, kept = [], []
    for name, seconds in (("minute", 60), ("hours", 4 * 3600)):
        write_long_video(tmp_path / name / "in" / "long.mkv", seconds, fps)
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / name), "30"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        clips, rows, peak = json.loads("[" + result.stdout.strip().splitlines()[-1].replace(" ", ", ") + "]")
        assert rows == 1
        print(f"{name}: {clips} clips, peak {peak:.0f} MiB")
        peaks.append(peak)
        kept.append(clips)
    assert kept == [3, 720]
    # The rows of the clips, and 8 bytes a frame for their times; the decoded pictures would be 9 KB each.
    assert peaks[1] - peaks[0] < 24
