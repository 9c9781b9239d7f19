"""`megatron-video measure`: colour and direction of generated shape videos against their prompts.

The decision is made by `training.shape_ruler` from the pixels of the mp4 files alone. With `--manifest` the same ruler
is laid on real clips and their captions, which shows what the ruler itself gets right.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.manifest import kept_rows, read_manifest
from megatron_video.video_io import read_frames
from training.proportions import wilson_interval
from training.shape_ruler import COLOUR_HUES, DIRECTION_VECTORS, Observation, Request, observe, parse_caption
from training.telemetry import write_json

CHANCE = {"colour": 1 / len(COLOUR_HUES), "direction": 1 / len(DIRECTION_VECTORS)}


@dataclass(frozen=True)
class Clip:
    """A video and the caption it should show; `span` is (first frame, number of frames), None for the whole file."""

    path: Path
    caption: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Measurement:
    """What was asked of one video and what it shows."""

    file: str
    caption: str
    asked: Request
    seen: Observation

    def correct(self, attribute: str) -> bool | None:
        """Whether `attribute` ("colour", "direction") is as asked; None where the caption does not ask for it."""
        wanted = getattr(self.asked, attribute)
        return None if wanted is None else bool(getattr(self.seen, attribute) == wanted)


def main(argv: Sequence[str]) -> None:
    """Measure and print a table, or JSON."""
    arguments = _parser().parse_args(argv)
    # argparse sees to it that exactly one of the two is given.
    source = arguments.samples or arguments.manifest
    clips = samples_of(arguments.samples) if arguments.samples else clips_of_manifest(arguments.manifest)
    measurements = [measure(clip) for clip in tqdm(clips[: arguments.limit], desc="measure", disable=None)]
    report = summarise(measurements, str(source))
    if arguments.out:
        details = [{**asdict(m), "correct": {a: m.correct(a) for a in CHANCE}} for m in measurements]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, {**report, "details": details})
    print(json.dumps(report, indent=2) if arguments.json else format_report(report))


def samples_of(source: Path) -> list[Clip]:
    """The samples listed in `source`: a `samples.jsonl` (or the folder with it) of {"prompt", "file"} lines.

    Raises:
        UserError: no such listing, a line that is not such an object, or a video that is not there.
    """
    listing = source / "samples.jsonl" if source.is_dir() else source
    if not listing.is_file():
        raise UserError(f"--samples {source}: there is no {listing}; give a folder made by `megatron-video sample`")
    clips = list(_listed(listing))
    missing = [str(clip.path) for clip in clips if not clip.path.is_file()]
    if missing:
        raise UserError(f"{listing} names {len(missing)} videos that are not there, first: {missing[0]}")
    if not clips:
        raise UserError(f"{listing} lists no samples")
    return clips


def clips_of_manifest(path: Path) -> list[Clip]:
    """The kept videos of a manifest with their captions; stills cannot move and are left out.

    Raises:
        UserError: not a manifest, or nothing in it to measure.
    """
    # Spans, not files: a file with a cut holds two clips.
    rows = [row for row in kept_rows(read_manifest(path)) if not row["is_image"]]
    if not rows:
        raise UserError(f"--manifest {path}: no videos are kept in it")
    spans = [(row["start_frame"], row["end_frame"] - row["start_frame"]) for row in rows]
    return [Clip(Path(row["source"]), row["caption"], span) for row, span in zip(rows, spans, strict=True)]


def measure(clip: Clip) -> Measurement:
    """Decode one video and look at it."""
    first, count = clip.span or (0, None)
    return Measurement(
        str(clip.path), clip.caption, parse_caption(clip.caption), observe(read_frames(clip.path, first, count))
    )


def summarise(measurements: Sequence[Measurement], source: str) -> dict[str, Any]:
    """Accuracies with their 95 % intervals, per class, and how many videos showed nothing.

    Raises:
        UserError: no caption asks for a colour or direction the ruler knows.
    """
    results = {attribute: [m.correct(attribute) for m in measurements] for attribute in CHANCE}
    # Only captions that ask for both count; a clip with a cut asks for two directions, that is for none.
    both = [c and d for c, d in zip(*results.values(), strict=True) if c is not None and d is not None]
    report: dict[str, Any] = {"source": source, "videos": len(measurements)}
    for attribute, correct in results.items():
        decided = [c for c in correct if c is not None]
        if not decided:
            raise UserError(f"{source}: no caption asks for one {attribute} of those that can be measured")
        report[attribute] = _accuracy(decided, CHANCE[attribute])
        report[attribute]["classes"] = _by_class(measurements, attribute)
    if both:
        report["both"] = _accuracy(both, math.prod(CHANCE.values()))
    report["no_foreground"] = sum(m.seen.colour is None for m in measurements)
    # Without a foreground there is nothing to move, so such a video counts once, above.
    report["no_motion"] = sum(m.seen.direction is None and m.seen.colour is not None for m in measurements)
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [f"measured {report['videos']} videos of {report['source']}", ""]
    lines.append(f"{'':<10} {'correct':>9} {'accuracy':>9} {'95 % interval':>16} {'chance':>8}")
    for name in ("colour", "direction", "both"):
        if name in report:
            lines.append(_table_line(name, report[name]))
    lines.append("")
    for attribute in CHANCE:
        for name, row in report[attribute]["classes"].items():
            seen = ", ".join(f"{value} {count}" for value, count in row["seen"].items())
            lines.append(f"  asked for {name:<7} {row['correct']:>4} of {row['total']:<4} seen: {seen}")
    lines += ["", f"without coloured foreground: {report['no_foreground']}, without motion: {report['no_motion']}"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-video measure", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", type=Path, help="folder of `megatron-video sample`, or its samples.jsonl")
    source.add_argument("--manifest", type=Path, help="measure the kept real clips of a manifest instead")
    parser.add_argument("--limit", type=int, help="measure only the first N videos")
    parser.add_argument("--out", type=Path, help="write the report with one entry a video as JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _listed(listing: Path) -> Iterator[Clip]:
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            yield Clip(listing.parent / entry["file"], entry["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{listing}, line {number}: not {{"prompt": ..., "file": ...}}: {line[:80]!r}') from None


def _accuracy(correct: Sequence[bool], chance: float) -> dict[str, Any]:
    low, high = wilson_interval(sum(correct), len(correct))
    count = {"correct": sum(correct), "total": len(correct)}
    return {**count, "accuracy": float(np.mean(correct)), "interval_95": [low, high], "chance": chance}


def _by_class(measurements: Sequence[Measurement], attribute: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name in COLOUR_HUES if attribute == "colour" else DIRECTION_VECTORS:
        seen = [getattr(m.seen, attribute) or "none" for m in measurements if getattr(m.asked, attribute) == name]
        counts = {value: seen.count(value) for value in sorted(set(seen), key=lambda v: -seen.count(v))}
        if seen:
            # "none" among the seen ones is a video without foreground or motion.
            table[name] = {"correct": counts.get(name, 0), "total": len(seen), "seen": counts}
    return table


def _table_line(name: str, row: dict[str, Any]) -> str:
    low, high = row["interval_95"]
    fraction, interval = f"{row['correct']}/{row['total']}", f"{low:.1%} - {high:.1%}"
    return f"{name:<10} {fraction:>9} {row['accuracy']:>9.1%} {interval:>16} {row['chance']:>8.1%}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
