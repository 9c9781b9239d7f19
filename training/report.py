"""`megatron-video report RUN`: what a run did, with plots, as one HTML file or as Markdown with PNGs."""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from megatron_video.cli import run_command
from training import report_figures as figures
from training.effective_time import Life, WallTime, find_lives, held_up, wall_time
from training.events import FAULTS
from training.report_document import Document, Picture, Section, Table
from training.run_records import GIB, RunRecords, read_run
from training.watch_panel import describe_event

_EVENTS_SHOWN = 200
_SHEET_WIDTH = 1400
_WHAT_COUNTS = (
    "Effective training time = total iteration time / total training time, as the paper of Step-Video-T2V defines it "
    "(arXiv 2502.10248, section 6.1). Total training time here is wall time from the first start of the job to its "
    "last record, with all restarts and the gaps between them. Total iteration time is the time of the steps whose "
    "work is in the weights, waiting for data included; of a step that was undone and done again only the last time "
    "counts. Checkpoints, validation, samples and start-up are outside of steps and so not effective."
)


def main(argv: Sequence[str]) -> int:
    """Write the report and say where it is."""
    parser = argparse.ArgumentParser(prog="megatron-video report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder named by run.output_dir")
    parser.add_argument("--out", type=Path, help=".html, or .md (default: RUN/report.html)")
    arguments = parser.parse_args(argv)
    path = arguments.out or arguments.run / "report.html"
    records = read_run(arguments.run)
    run_report(records).write(path)
    spent = wall_time(records)
    print(f"{path}: {len(records.lives)} starts, effective training time {spent.effective:.1%}")
    return 0


def run_report(records: RunRecords) -> Document:
    """Everything there is to say of a run."""
    spent = wall_time(records)
    folder, written = records.folder.resolve(), datetime.now(UTC)
    document = Document(
        f"Run {folder.name}",
        f"{folder}, written {written:%Y-%m-%d %H:%M} UTC; {records.status['state']} at step "
        f"{int(records.steps.kept_column('step')[-1]):,} of {records.total_steps:,}.",
    )
    sections = [
        Section("Summary", [_summary(records, spent)]),
        _section("Loss", ("loss", "loss over steps", figures.loss_figure(records))),
        _section("Loss by t", ("loss_by_time", "loss of ten parts of t", figures.loss_by_time_figure(records))),
        _validation(records),
        _section("Gradient", ("gradient", "gradient norm and learning rate", figures.gradient_figure(records))),
        _section("Layers", ("layers", "sizes of activations and gradients", figures.layer_figure(records))),
        _section(
            "Speed",
            ("throughput", "tokens a second and use of the devices", figures.throughput_figure(records)),
            ("step_time", "seconds of a step", figures.step_time_figure(records)),
        ),
        _section("Memory", ("memory", "memory of the fullest rank", figures.memory_figure(records))),
        _wall_time(records, spent),
        _checkpoints(records),
        _faults(records),
        *_samples(records),
    ]
    document.sections.extend(section for section in sections if section.blocks)
    return document


def _summary(records: RunRecords, spent: WallTime) -> Table:
    steps, info = records.steps, records.lives[-1]
    kept = {
        name: steps.kept_column(name) for name in ("loss", "tokens", "samples", "flops", "step_seconds", "data_seconds")
    }
    seconds = kept["step_seconds"].sum()
    rows = [
        ("ranks", f"{info['world_size']} ({info['host']})"),
        ("code", f"megatron-video {info['megatron_video']}, revision {info['git_revision'] or 'unknown'}"),
        ("steps in the weights", f"{len(kept['loss']):,}, and {spent.lost_step_count:,} that were undone"),
        ("samples, tokens", f"{kept['samples'].sum():,.0f}, {kept['tokens'].sum():,.0f}"),
        ("loss, last tenth of the steps", f"{np.nanmean(kept['loss'][-max(len(kept['loss']) // 10, 1) :]):.5g}"),
        *_last_validation(records),
        ("speed", f"{kept['tokens'].sum() / seconds:,.0f} tokens/s, {seconds / len(kept['loss']):.3g} s a step"),
        ("use of the devices", _use(records, kept["flops"].sum() / seconds)),
        ("waiting for data", f"{kept['data_seconds'].sum() / seconds:.2%} of the steps' time"),
        ("wall time", f"{_duration(spent.total)}, {len(records.lives)} starts"),
        ("effective training time", f"{spent.effective:.2%}"),
        ("refused steps", f"{spent.refused_step_count:,}"),
    ]
    return Table(["", ""], rows)


def _use(records: RunRecords, flops_per_second: float) -> str:
    device = flops_per_second / records.lives[-1]["world_size"] / 1e12
    if records.peak_flops is None:
        return f"{device:.4g} TFLOP/s a device (training.peak_tflops would give MFU)"
    return f"MFU {flops_per_second / records.peak_flops:.2%} by the cost model, {device:.4g} TFLOP/s a device"


def _last_validation(records: RunRecords) -> list[tuple[str, str]]:
    events = records.kept_events_of("validation")
    if not events:
        return []
    losses = ", ".join(f"{found['loss']:.5g} ({weights} weights)" for weights, found in events[-1]["losses"].items())
    return [(f"held-out loss at step {events[-1]['step']:,}", losses)]


def _validation(records: RunRecords) -> Section:
    events = records.kept_events_of("validation")
    if not events:
        return Section("Validation", [])
    last = events[-1]
    weights = list(last["losses"])
    rows = [
        [bucket, *(f"{np.mean(last['losses'][name]['by_bucket'][bucket]):.5g}" for name in weights)]
        for bucket in last["losses"][weights[0]]["by_bucket"]
    ]
    picture = Picture("validation", "loss on held-out samples", figures.validation_figure(records) or b"")
    header = [f"bucket, after step {last['step']:,}", *(f"{name} weights" for name in weights)]
    return Section("Validation", [picture, Table(header, rows)])


def _wall_time(records: RunRecords, spent: WallTime) -> Section:
    rows = [(name, f"{seconds:,.1f}", f"{seconds / spent.total:.2%}") for name, seconds in spent.parts().items()]
    picture = Picture("wall_time", "steps over wall time, and its parts", figures.wall_time_figure(records, spent))
    parts = Table(["what", "seconds", "share"], [*rows, ("total training time", f"{spent.total:,.1f}", "100.00%")])
    lives = Table(
        ["start", "at (UTC)", "ranks", "from step", "to step", "undone", "ended"],
        [_life_row(records, life) for life in find_lives(records)],
    )
    result = f"Effective training time: {spent.steps:,.1f} s / {spent.total:,.1f} s = {spent.effective:.2%}."
    return Section("Where the wall time went", [result, _WHAT_COUNTS, picture, parts, lives])


def _life_row(records: RunRecords, life: Life) -> list[str]:
    steps = records.steps
    undone = int(((steps["life"] == life.number) & ~steps.kept).sum())
    started = datetime.fromtimestamp(life.started, UTC)
    # Nobody writes down that a process was killed.
    running = life.number == len(records.lives) and records.status["state"] == "running"
    end = life.end_reason or ("no record of its end: running or killed" if running else "killed: no record of its end")
    numbers = [f"{n:,}" for n in (life.world_size, life.first_step, life.last_step, undone)]
    return [str(life.number), f"{started:%Y-%m-%d %H:%M:%S}", *numbers, end]


def _checkpoints(records: RunRecords) -> Section:
    saves = records.events_of("save")
    if not saves:
        return Section("Checkpoints", [])
    seconds, blocked = [save["seconds"] for save in saves], [held_up(save) for save in saves]
    rows = [
        ("saves", f"{len(saves):,}"),
        ("seconds until complete, mean and largest", f"{np.mean(seconds):.2f}, {max(seconds):.2f}"),
        ("seconds that training waited, mean and largest", f"{np.mean(blocked):.3f}, {max(blocked):.3f}"),
        ("GiB of the last one", f"{saves[-1]['bytes'] / GIB:.3f}"),
        ("the last one", str(saves[-1]["checkpoint"])),
    ]
    picture = Picture("checkpoints", "seconds of every save", figures.checkpoint_figure(records) or b"")
    return Section("Checkpoints", [picture, Table(["", ""], rows)])


def _faults(records: RunRecords) -> Section:
    happened = records.events_of(*FAULTS, "stop")
    counts = Counter(event["event"] for event in happened)
    told = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items()) or "none"
    text = f"{len(records.lives) - 1} restarts. Events: {told}."
    if len(happened) > _EVENTS_SHOWN:
        text += f" The last {_EVENTS_SHOWN} are shown; events.jsonl has all."
    rows = [
        (event["time"][:19].replace("T", " "), str(event["life"]), f"{event['step']:,}", describe_event(event))
        for event in happened[-_EVENTS_SHOWN:]
    ]
    return Section(
        "Faults and restarts", [text, *([Table(["at (UTC)", "start", "step", "event"], rows)] if rows else [])]
    )


def _samples(records: RunRecords) -> list[Section]:
    """The first and the last contact sheet."""
    found = records.kept_events_of("samples")
    if not found:
        return []
    # Here, as it takes seconds to import what makes samples.
    from training.sample_folder import SHEET_FILE

    made = [event for event in found if (Path(event["folder"]) / SHEET_FILE).is_file()]
    chosen = [made[0], made[-1]] if len(made) > 1 else made
    blocks: list[str | Picture] = []
    for event in chosen:
        blocks.append(f"Step {event['step']:,}, {event['weights']} weights: {event['folder']}")
        png = _shrunk(Path(event["folder"]) / SHEET_FILE)
        blocks.append(Picture(f"samples_{event['step']:08d}", f"samples after step {event['step']}", png))
    return [Section("Samples", blocks)]


def _shrunk(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((_SHEET_WIDTH, 4 * _SHEET_WIDTH))
        output = io.BytesIO()
        picture.save(output, "PNG")
    return output.getvalue()


def _section(title: str, *pictures: tuple[str, str, bytes | None]) -> Section:
    return Section(title, [Picture(name, text, png) for name, text, png in pictures if png is not None])


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
