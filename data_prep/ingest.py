"""`megatron-video data ingest`: videos and images with captions, in a folder, a listing or tars -> manifest.

Captions come from listings named captions.* or metadata.* (.jsonl, .csv, .parquet; fields path, caption, and language
and title if known) or from sidecar files NAME.txt / NAME.json, also inside tars (webdataset's form), whose media are
taken out to a folder beside the manifest. Every file is probed and hashed; one that is unreadable, cut short, without
a caption, or a copy of another stays as a dropped row with the reason.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from data_prep.listing import Entry, detect_language, find_entries
from data_prep.stage import StageReport, execution_of, fingerprint_of, lost_row, print_report, run_parts, stage_parser
from data_prep.tar_members import content_hash, entries_of_tar
from data_prep.workers import Execution, as_execution, parallel_map, progress
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import Row, clip_id, dropped
from megatron_video.video_io import probe

STAGE = "ingest"


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, __doc__, source="FOLDER_OR_LISTING_OR_TAR", spread=True)
    parser.add_argument("--extract-to", type=Path, help="folder for what tars hold (default: OUT.files)")
    parser.add_argument("--uncaptioned", action="store_true", help="keep clips without a caption; `caption` writes one")
    arguments = parser.parse_args(argv)
    report = run(
        arguments.source,
        arguments.out,
        execution_of(arguments),
        arguments.extract_to,
        uncaptioned=arguments.uncaptioned,
    )
    print_report(report, arguments.json)
    return 0


def run(
    source: Path,
    manifest_out: Path,
    workers: int | Execution = 1,
    extract_to: Path | None = None,
    uncaptioned: bool = False,
) -> StageReport:
    """Write the first manifest of a folder, a listing or a tar.

    Args:
        extract_to: folder for the media inside tars; default: the manifest's name with `.files`.
        uncaptioned: clips without a caption are kept.

    Raises:
        UserError: no media there, or a listing that is damaged or names missing files.
    """
    found = find_entries(source)
    entries = found.entries
    if found.tars:
        folder = extract_to or manifest_out.with_suffix(".files")
        entries = entries + _entries_of_tars(found.tars, folder, as_execution(workers))
    process = functools.partial(_ingest_file, uncaptioned=uncaptioned)
    fingerprint = fingerprint_of(STAGE, {"uncaptioned": uncaptioned}, _digest(entries))
    report = run_parts(STAGE, entries, manifest_out, process, fingerprint, workers, _drop_copies, _lost_file)
    passed_over = {"passed over": found.passed_over} if found.passed_over else {}
    return replace(report, details={**report.details, **passed_over})


def _entries_of_tars(tars: Sequence[Path], folder: Path, execution: Execution) -> list[Entry]:
    take_out = functools.partial(entries_of_tar, folder=folder)
    # A task of an array begins with its own share. Then it needs what the others took out too, and finds it there.
    shard = execution.shard
    numbers = sorted(range(len(tars)), key=lambda number: shard is not None and number not in shard)
    order = [tars[number] for number in numbers]
    done = progress(parallel_map(take_out, order, execution), len(order), "tars", "tar")
    found = dict(zip(order, done, strict=True))
    return [entry for tar in tars for entry in found[tar]]


def _digest(entries: Sequence[Entry]) -> str:
    """Names, captions, sizes and times stand for the contents: hashing everything to find nothing new is slow."""
    digest = hashlib.sha256()
    for entry in entries:
        # What was taken out of a tar has its content in its name; what is not there, as a broken link, gives a row too.
        stat = os.stat(entry.path) if not entry.origin and os.path.isfile(entry.path) else None
        digest.update(repr((entry, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()


def _lost_file(entry: Entry) -> list[Row]:
    return lost_row(STAGE, _listed(entry))


def _listed(entry: Entry) -> Row:
    """What is known without opening the file."""
    caption = (entry.caption or "").strip()
    row: Row = {"source": entry.path, "caption": caption or None, "title": entry.title, "origin": entry.origin}
    return {**row, "language": entry.language or detect_language(caption)}


def _ingest_file(entry: Entry, uncaptioned: bool) -> list[Row]:
    row = _listed(entry)
    if entry.fault:
        return [dropped(row, STAGE, entry.fault)]
    if not os.path.isfile(entry.path):
        return [dropped(row, STAGE, f"unreadable: {entry.path}: no such file, or a link to none, or a device")]
    try:
        row["content_hash"] = Path(entry.path).stem if entry.origin else content_hash(entry.path)
        row |= _describe(entry.path, row["content_hash"], entry.title)
    except UserError as error:
        return [dropped(row, STAGE, f"unreadable: {error}")]
    except OSError as error:
        return [dropped(row, STAGE, f"unreadable: {entry.path}: {error.strerror}")]
    # Last, so that a file with two faults is reported for the graver one.
    if not row["caption"] and not uncaptioned:
        return [dropped(row, STAGE, "no caption: neither a listing nor a sidecar .txt or .json has one")]
    return [row]


def _describe(path: str, file_hash: str, title: str | None) -> Row:
    info = probe(path)
    # These columns have the probe's own names.
    same = ("is_image", "codec", "pixel_format", "rotation", "width", "height", "fps", "variable_fps", "duration")
    return {
        **{name: getattr(info, name) for name in (*same, "audio", "hdr", "color_transfer")},
        "clip_id": clip_id(file_hash, 0, info.num_frames),
        "title": title or info.title,
        "start_frame": 0,
        "end_frame": info.num_frames,
        "start_time": 0.0,
        "end_time": info.duration,
    }


def _drop_copies(table: pa.Table) -> pa.Table:
    """Keep the first file of each content: a key is made of the content, and may occur once."""
    # Column by column: rows as Python objects would need ten times the memory.
    hashes, origins, sources, by, reasons = (
        table[name].to_pylist() for name in ("content_hash", "origin", "source", "dropped_by", "drop_reason")
    )
    first: dict[str, int] = {}
    for number, file_hash in enumerate(hashes):
        # Entries come in one order, so the same file is kept in every run.
        original = number if by[number] else first.setdefault(file_hash, number)
        if original != number:
            by[number] = STAGE
            reasons[number] = f"copy: same bytes as {origins[original] or sources[original]}"
    for name, values in (("dropped_by", by), ("drop_reason", reasons)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
