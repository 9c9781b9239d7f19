"""A file of its own for a clip, where spans of the source are not wanted: H.264, upright, 8-bit, without sound."""

from __future__ import annotations

from pathlib import Path

from data_prep.tar_members import content_hash
from megatron_video.buckets import CropBox
from megatron_video.manifest import Row
from megatron_video.video_io import VideoError, iter_frames, probe, write_mp4_stream
from megatron_video.video_probe import frame_times


def reencoded(row: Row, folder: Path) -> Row:
    """Write the clip's frames to FOLDER/xx/CLIP_ID.mp4, one file or none, and return the row of that file.

    The clip keeps its id, so it is the same clip with every encoder; the last row and column of odd sizes go, as 4:2:0
    colour needs even ones. A file that is there already is taken: its name says what is in it.

    Raises:
        VideoError: the source cannot be read, or is too small.
        OSError: the folder cannot be written.
    """
    # Two levels: file systems dislike folders with millions of files, and so does the search below.
    path = folder / row["clip_id"][:2] / f"{row['clip_id']}.mp4"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a run that was killed; nobody else writes this clip.
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink()
        _write(row, path)
    info = probe(path)
    count = row["end_frame"] - row["start_frame"]
    if info.num_frames != count:
        raise VideoError(f"{path}: {info.num_frames} frames of {count}; remove it, and it is written again")
    same = ("codec", "pixel_format", "rotation", "width", "height", "fps", "variable_fps", "duration")
    return {
        **row,
        **{name: getattr(info, name) for name in (*same, "audio", "hdr", "color_transfer")},
        "source": str(path.absolute()),
        "origin": f"{row['source']}::{row['start_frame']}-{row['end_frame']}",
        "content_hash": content_hash(path),
        "start_frame": 0,
        "end_frame": count,
        "start_time": 0.0,
        "end_time": info.duration,
    }


def _write(row: Row, path: Path) -> None:
    start, end = row["start_frame"], row["end_frame"]
    box = CropBox(0, 0, row["width"] - row["width"] % 2, row["height"] - row["height"] % 2)
    frames = iter_frames(row["source"], start, end, crop=box)
    times = frame_times(row["source"])[start:end] if row["variable_fps"] else None
    write_mp4_stream(path, frames, row["fps"], times=times)
