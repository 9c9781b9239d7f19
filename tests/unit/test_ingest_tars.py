"""Tars of raw videos: every member becomes a row that later stages can read; damaged tars lose only what is damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from nasty_videos import numbers_of, scenes, write_video
from PIL import Image

from data_prep import ingest, segment
from data_prep.workers import Execution, Shard
from megatron_video.errors import UserError
from megatron_video.manifest import Row, read_manifest
from megatron_video.video_io import read_frames


def video_bytes(folder: Path, seed: int) -> bytes:
    return write_video(folder / f"{seed}.mp4", scenes([30], 48, 64, seed)).read_bytes()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def rows_of(manifest: Path) -> list[Row]:
    rows: list[Row] = read_manifest(manifest).to_pylist()
    return rows


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_members_become_rows_with_their_captions(tmp_path: Path, suffix: str) -> None:
    one, two, three = (video_bytes(tmp_path / "made", seed) for seed in range(3))
    picture = io.BytesIO()
    Image.fromarray(scenes([1], 40, 60)[0]).save(picture, "png")
    members = [
        ("000/a.mp4", one),
        ("000/a.txt", "红色 one".encode()),
        ("000/b.json", json.dumps({"caption": "two", "title": "The Title", "language": "fr"}).encode()),
        ("000/b.mp4", two),
        ("001/a.video.MP4", three),
        ("001/a.caption.txt", b"three"),
        ("001/picture.png", picture.getvalue()),
        ("001/picture.json", b'{"caption": "not this one"}'),
        ("001/picture.txt", b"a picture"),
        ("readme.md", b"not media"),
    ]
    tar = write_tar(tmp_path / f"clips{suffix}", members, "w:gz" if suffix == ".tar.gz" else "w")
    report = ingest.run(tar, tmp_path / "m.parquet")
    rows = rows_of(tmp_path / "m.parquet")
    assert (report.kept, report.dropped_here) == (4, 0)
    assert [row["origin"] for row in rows] == [f"{tar}::{members[n][0]}" for n in (0, 3, 4, 6)]
    told = [(row["caption"], row["language"], row["title"]) for row in rows]
    assert told == [
        ("红色 one", "zh", None),
        ("two", "fr", "The Title"),
        ("three", "en", None),
        ("a picture", "en", None),
    ]
    # Later stages read the row like any other.
    segment.run(tmp_path / "m.parquet", tmp_path / "s.parquet")
    clip = rows_of(tmp_path / "s.parquet")[1]
    frames = read_frames(clip["source"], clip["start_frame"], 24)
    assert np.abs(np.array(numbers_of(frames)) - np.arange(3, 27)).max() <= 2


def test_a_folder_of_tars_beside_files_and_copies_over_both(tmp_path: Path) -> None:
    one, two = (video_bytes(tmp_path / "made", seed) for seed in range(2))
    folder = tmp_path / "in"
    write_tar(folder / "b.tar", [("x.mp4", one), ("x.txt", b"x"), ("y.mp4", two), ("y.txt", b"y"), ("y.mp4", two)])
    write_tar(folder / "a.tar", [("x.mp4", two), ("x.txt", b"the first")])
    (folder / "z.mp4").write_bytes(one)
    (folder / "z.txt").write_text("outside")
    report = ingest.run(folder, tmp_path / "m.parquet", workers=2)
    rows = rows_of(tmp_path / "m.parquet")
    assert (report.kept, report.reasons) == (2, {"copy": 3})
    assert [row["caption"] for row in rows if not row["dropped_by"]] == ["outside", "the first"]
    assert rows[2]["drop_reason"] == f"copy: same bytes as {folder / 'z.mp4'}"
    assert rows[4]["drop_reason"] == f"copy: same bytes as {folder / 'a.tar'}::x.mp4"
    # Equal members take their place once, and nothing half written stays.
    files = [path for path in (tmp_path / "m.files").rglob("*.*") if path.suffix not in (".jsonl", ".lock")]
    assert len(files) == 2


def test_a_tar_is_taken_out_once(tmp_path: Path) -> None:
    members = [("a.mp4", video_bytes(tmp_path / "made", 0)), ("a.txt", b"line one\x0b\xe2\x80\xa8line two")]
    tar = write_tar(tmp_path / "clips.tar", members)
    ingest.run(tar, tmp_path / "m.parquet", extract_to=tmp_path / "taken")
    (row,) = rows_of(tmp_path / "m.parquet")
    written = Path(row["source"]).stat().st_mtime_ns
    ingest.run(tar, tmp_path / "again.parquet", extract_to=tmp_path / "taken")
    assert Path(row["source"]).stat().st_mtime_ns == written
    assert rows_of(tmp_path / "again.parquet") == [row]
    assert ingest.run(tar, tmp_path / "m.parquet", extract_to=tmp_path / "taken").up_to_date
    # What somebody removed is taken out again.
    Path(row["source"]).unlink()
    ingest.run(tar, tmp_path / "third.parquet", extract_to=tmp_path / "taken")
    assert rows_of(tmp_path / "third.parquet") == [row]
    assert Path(row["source"]).is_file()


def test_texts_that_several_members_could_claim_are_nobody_s_caption(tmp_path: Path) -> None:
    one, two, three = (video_bytes(tmp_path / "made", seed) for seed in range(3))
    members = [("a.1.mp4", one), ("a.1.txt", b"one"), ("a.2.mp4", two), ("a.2.txt", b"two"), ("a.3.mp4", three)]
    ingest.run(write_tar(tmp_path / "clips.tar", members), tmp_path / "m.parquet")
    assert [row["caption"] for row in rows_of(tmp_path / "m.parquet")] == ["one", "two", None]


def test_member_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    tar = tmp_path / "clips.tar"
    write_tar(tar, [(name, video_bytes(tmp_path / "made", 0)), (name.replace(".mp4", ".txt"), b"a cup")])
    ingest.run(tar, tmp_path / "m.parquet")
    (row,) = rows_of(tmp_path / "m.parquet")
    assert (row["origin"], row["caption"], row["dropped_by"]) == (f"{tar}::caf\\xe9.mp4", "a cup", None)


def test_damaged_and_empty_tars_are_rows_too(tmp_path: Path) -> None:
    one, two = (video_bytes(tmp_path / "made", seed) for seed in range(2))
    folder = tmp_path / "in"
    whole = write_tar(folder / "cut.tar", [("a.mp4", one), ("a.txt", b"a"), ("b.mp4", two), ("b.txt", b"b")])
    whole.write_bytes(whole.read_bytes()[: 512 + len(one) + 2500])
    (folder / "text.tar").write_text("no tar at all")
    (folder / "zero.tar").touch()
    write_tar(folder / "none.tar", [("readme.md", b"nothing")])
    bad_json = write_tar(folder / "sidecar.tar", [("c.mp4", two), ("c.json", b"{")])
    report = ingest.run(folder, tmp_path / "m.parquet")
    found = {row["origin"]: row for row in rows_of(tmp_path / "m.parquet")}
    assert found[f"{whole}::a.mp4"]["caption"] == "a"
    assert found[str(whole)]["drop_reason"].startswith(f"unreadable: {whole}: damaged after 1 media")
    for name in ("text.tar", "zero.tar"):
        assert str(folder / name) in found[str(folder / name)]["drop_reason"]
    assert found[str(folder / "none.tar")]["drop_reason"].startswith("no media")
    assert found[f"{bad_json}::c.mp4"]["drop_reason"].startswith("sidecar: c.json cannot be read")
    assert report.kept == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "clips.tar", [("a.mp4", b"x")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--extract-to .*file"):
        ingest.run(tar, tmp_path / "m.parquet", extract_to=tmp_path / "file")


def test_tasks_of_an_array_take_out_each_tar_once_and_agree(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for seed in range(4):
        members = [("x.mp4", video_bytes(tmp_path / "made", seed)), ("x.txt", f"clip {seed}".encode())]
        write_tar(folder / f"{seed}.tar", members)
    ingest.run(folder, tmp_path / "alone.parquet", extract_to=tmp_path / "taken")
    for index in (1, 0):
        task = Execution(shard=Shard(index, 2))
        report = ingest.run(folder, tmp_path / "array.parquet", task, tmp_path / "apart")
        if index == 1:
            assert not (tmp_path / "array.parquet").exists()
    assert report.details["joined"]
    alone, array = rows_of(tmp_path / "alone.parquet"), rows_of(tmp_path / "array.parquet")
    assert len(alone) == 4
    for one, other in zip(alone, array, strict=True):
        assert Path(one.pop("source")).name == Path(other.pop("source")).name
        assert one == other
