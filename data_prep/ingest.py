"""`megatron-video data ingest`: a folder of videos and images with captions, or a listing of them -> manifest.

Captions come from listings named captions.* or metadata.* (.jsonl, .csv, .parquet; fields path, caption, and language
if known) or from sidecar files NAME.txt / NAME.json. Every file is probed and hashed; one that is unreadable, cut
short, without a caption, or a copy of another stays as a dropped row with the reason.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from data_prep.listing import Entry, detect_language, find_entries
from data_prep.stage import StageReport, fingerprint_of, print_report, run_parts, stage_parser
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, clip_id, dropped, table_from_rows
from megatron_video.video_io import probe

STAGE = "ingest"


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, source="FOLDER_OR_LISTING")
    arguments = parser.parse_args(argv)
    print_report(run(arguments.source, arguments.out, arguments.workers), arguments.json)
    return 0


def run(source: Path, manifest_out: Path, workers: int = 1) -> StageReport:
    """Write the first manifest of a folder or listing.

    Raises:
        UserError: no media there, or a listing that is damaged or names missing files.
    """
    entries = find_entries(source)
    # Names, captions, sizes and times stand for the contents: hashing everything just to find nothing new is slow.
    stats = [(entry, os.stat(entry.path).st_size, os.stat(entry.path).st_mtime_ns) for entry in entries]
    fingerprint = fingerprint_of(STAGE, {}, hashlib.sha256(repr(stats).encode()).hexdigest())
    return run_parts(STAGE, entries, manifest_out, _ingest_file, fingerprint, workers, _drop_copies)


def _ingest_file(entry: Entry) -> list[Row]:
    caption = (entry.caption or "").strip()
    row: Row = {"source": entry.path, "caption": caption or None}
    row["language"] = entry.language or detect_language(caption)
    try:
        row["content_hash"] = _content_hash(entry.path)
        row |= _describe(entry.path, row["content_hash"])
    except UserError as error:
        return [dropped(row, STAGE, f"unreadable: {error}")]
    except OSError as error:
        return [dropped(row, STAGE, f"unreadable: {entry.path}: {error.strerror}")]
    # Last, so that a file with two faults is reported for the graver one.
    if not caption:
        return [dropped(row, STAGE, "no caption: neither a listing nor a sidecar .txt or .json has one")]
    return [row]


def _describe(path: str, content_hash: str) -> Row:
    info = probe(path)
    return {
        "clip_id": clip_id(content_hash, 0, info.num_frames),
        "is_image": info.is_image,
        "codec": info.codec,
        "pixel_format": info.pixel_format,
        "rotation": info.rotation,
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "start_frame": 0,
        "end_frame": info.num_frames,
        "start_time": 0.0,
        "end_time": info.duration,
    }


def _content_hash(path: str) -> str:
    digest = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _drop_copies(table: pa.Table) -> pa.Table:
    """Keep the first file of each content: a key is made of the content, and may occur once."""
    first: dict[str, str] = {}
    rows = []
    for row in table.to_pylist():
        # Rows come sorted by path, so the same file is kept in every run.
        original = row["source"] if row["dropped_by"] else first.setdefault(row["content_hash"], row["source"])
        rows.append(row if original == row["source"] else dropped(row, STAGE, f"copy: same bytes as {original}"))
    return table_from_rows(rows)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
