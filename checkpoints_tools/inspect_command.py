"""`megatron-video ckpt inspect`: what a checkpoint is and holds, for a terminal of 120 columns or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints_tools.forms import Reading, add_reading_options, reading_of
from checkpoints_tools.inspection import PARTS, Inspection, Sizes, TensorInfo, add_stats, inspect
from checkpoints_tools.run_listing import is_run, newest_of, run_json, run_lines
from checkpoints_tools.tensor_stats import TensorStats
from checkpoints_tools.wording import bytes_text, duration_text, flat, number_text, plain, shape_text
from training.layout_matrix.report import text_table

_WIDTH = 120
_NAME_WIDTH, _NAME_WIDTH_BESIDE_STATS = 72, 46
_FILES_SHOWN = 8
_STATS = [field.name for field in dataclasses.fields(TensorStats)]
SORTS = ["stored", "name", "size", *_STATS]
# Of the training state, what is said in other places or in sentences.
_TOLD = ("step", "consumed_samples", "encoders", "averages_weights", "data_plan")


def add_command(commands: Any) -> None:
    """The subcommand `inspect`."""
    command = commands.add_parser(
        "inspect",
        help="what a checkpoint is and holds: layout, sizes, step, config, tensors and their figures",
        description="From metadata alone, of any form. A run folder: the list of its checkpoints, and with --tensors "
        "or --stats the tensors of the newest.",
    )
    command.add_argument("path", type=Path, help="run folder, step folder, or weights in any other form")
    command.add_argument("--tensors", action="store_true", help="a line for every tensor")
    command.add_argument("--stats", action="store_true", help="read them: norm, mean, std, min, max, zeros, NaN, inf")
    command.add_argument("--part", choices=[*PARTS, "all"], help="of a megatron-core checkpoint (default weights)")
    command.add_argument("--filter", action="append", default=[], metavar="GLOB", help="only tensors so named")
    command.add_argument("--sort", choices=SORTS, default="stored", help="names upwards, all else downwards")
    command.add_argument("--json", action="store_true", help="print all of it as JSON, with all tensors and files")
    add_reading_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    stats = arguments.stats or arguments.sort in _STATS
    listed = arguments.tensors or stats
    if is_run(arguments.path) and not listed:
        lines = run_lines(arguments.path)
        print(json.dumps(run_json(arguments.path)) if arguments.json else "\n".join(lines))
        return 0
    path = newest_of(arguments.path) if is_run(arguments.path) else arguments.path
    reading: Reading = reading_of(arguments)
    found = inspect(path, reading)
    chosen = found.chosen(_parts(arguments), arguments.filter)
    if stats:
        add_stats(chosen)
    chosen = _sorted(chosen, arguments.sort)
    if arguments.json:
        # Without a choice, all tensors: JSON is complete.
        choice = chosen if listed or arguments.filter else found.tensors
        print(json.dumps(as_json(found, choice), allow_nan=False))
        return 0
    print("\n".join(_lines(found)))
    if listed or arguments.filter:
        print("\n" + _tensor_table(chosen, stats))
        print(f"\n{len(chosen)} of {len(found.tensors)} tensors and objects; --part, --filter and --sort choose")
    return 0


def _parts(arguments: argparse.Namespace) -> Sequence[str]:
    if arguments.part is None:
        # A pattern is looked for wherever there are values.
        return [part for part in PARTS if part != "objects"] if arguments.filter else ["weights"]
    return PARTS if arguments.part == "all" else [arguments.part]


def _sorted(tensors: Sequence[TensorInfo], sort: str) -> list[TensorInfo]:
    if sort == "stored":
        return list(tensors)
    if sort == "name":
        return sorted(tensors, key=lambda tensor: tensor.name)
    if sort == "size":
        return sorted(tensors, key=lambda tensor: -tensor.bytes)
    figures = {id(tensor): getattr(tensor.stats, sort) if tensor.stats else None for tensor in tensors}
    return sorted(tensors, key=lambda t: (figures[id(t)] is None, -(figures[id(t)] or 0)))


def as_json(found: Inspection, tensors: Sequence[TensorInfo]) -> dict[str, Any]:
    """Everything, with these tensors."""
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "tensors"}
    values |= {name: {key: vars(sizes) for key, sizes in values[name].items()} for name in ("parts", "groups")}
    values["files"] = [vars(file) for file in found.files]
    values["layout"] = vars(found.layout) if found.layout else None
    rows = []
    for tensor in tensors:
        row = {name: value for name, value in vars(tensor).items() if name not in ("read", "stats")}
        rows.append(row | ({"stats": vars(tensor.stats)} if tensor.stats else {}))
    return dict(plain({**values, "age_seconds": found.age, "tensors": rows}))


def _lines(found: Inspection) -> Iterator[str]:
    yield found.path
    step = f", step {found.state['step']}" if "step" in found.state else ""
    parameters = found.parts["weights"].parameters
    yield f"{found.form}: {found.kind}{step}, {parameters:,} parameters"
    when = datetime.fromtimestamp(found.written, UTC).isoformat(" ", "seconds").removesuffix("+00:00")
    total = bytes_text(sum(file.size for file in found.files))
    yield f"written {when} UTC, {duration_text(found.age)} ago; {len(found.files)} files, {total}"
    yield from (f"FAULT: {fault}" for fault in found.faults)
    yield ""
    yield _sizes_table("part", {name: sizes for name, sizes in found.parts.items() if sizes.tensors})
    yield ""
    yield _sizes_table("module (weights)", found.groups)
    yield ""
    yield from _facts("model", found.model)
    yield from _layout_lines(found)
    yield from _facts("not default", found.changed)
    for command, record in found.records.items():
        yield from _facts(f"made by ckpt {command}", record)
    yield from _state_lines(found)
    yield ""
    yield _files_table(found)


def _sizes_table(title: str, sizes: Mapping[str, Sizes]) -> str:
    total = sum(each.bytes for each in sizes.values()) or 1
    rows = [
        [
            name,
            str(each.tensors),
            f"{each.parameters:,}" if each.parameters else "-",
            bytes_text(each.bytes),
            f"{100 * each.bytes / total:.1f}%",
            ", ".join(dtype if len(each.dtypes) == 1 else f"{n} {dtype}" for dtype, n in each.dtypes.items()),
        ]
        for name, each in sizes.items()
    ]
    return text_table([title, "tensors", "values", "bytes", "share", "types"], rows)


def _facts(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """`title: name=value ...` in as many lines as it takes."""
    if values:
        # Values with blanks are kept on one line.
        words = [f"{name}={json.dumps(value, ensure_ascii=False)}".replace(" ", "\0") for name, value in flat(values)]
        text = f"{title}: " + " ".join(words)
        wrapped = textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        yield from (line.replace("\0", " ") for line in wrapped)


def _layout_lines(found: Inspection) -> Iterator[str]:
    yield from _facts("layout, by its configuration", found.parallel)
    layout = found.layout
    if layout is None:
        return
    pieces = ", ".join(f"{count} as {cut}" for cut, count in layout.pieces.items()) or "none"
    files = f"{layout.tensor_files} files of {layout.writing_ranks} ranks"
    yield f"layout, by its files: {files}; weights in pieces: {pieces}"
    tensor_parallel = layout.tensor_parallel or "not clear"
    zero = "in smaller pieces than" if layout.optimizer_cut_further else "cut like"
    state = f", optimizer state {zero} the weights" if found.parts["optimizer"].tensors else ""
    yield f"  a guess from that: TP {tensor_parallel}, pipeline stages at least {layout.pipeline_stages}{state}"


def _state_lines(found: Inspection) -> Iterator[str]:
    if not found.state:
        return
    consumed: Mapping[str, int] = found.state.get("consumed_samples") or {}
    buckets = ", ".join(f"{bucket} {count:,}" for bucket, count in consumed.items())
    yield f"consumed samples: {sum(consumed.values()):,}" + (f" ({buckets})" if buckets else "")
    yield from _facts("data plan", found.state.get("data_plan") or {})
    rest = {name: value for name, value in found.state.items() if name not in _TOLD and value}
    yield from _facts("training state", rest | found.common)
    yield f"averages: {'yes' if found.parts['averages'].tensors else 'none'}"
    yield from _facts("encoders (fingerprints)", found.encoders)


def _files_table(found: Inspection) -> str:
    largest = sorted(found.files, key=lambda file: -file.size)[:_FILES_SHOWN]
    table = text_table(["file", "bytes", "crc32"], [[f.name, f"{f.size:,}", f.crc32 or "-"] for f in largest])
    more = len(found.files) - len(largest)
    recorded = sum(file.crc32 is not None for file in found.files)
    note = f"and {more} smaller ones; " if more else ""
    return f"{table}\n{note}checksums recorded of {recorded} files"


def _tensor_table(tensors: Sequence[TensorInfo], stats: bool) -> str:
    header = ["tensor", "shape", "type", *(_STATS if stats else ["stored as", "file"])]
    return text_table(header, [_tensor_row(tensor, stats) for tensor in tensors])


def _tensor_row(tensor: TensorInfo, stats: bool) -> list[str]:
    width = _NAME_WIDTH_BESIDE_STATS if stats else _NAME_WIDTH
    name = tensor.name if len(tensor.name) <= width else "..." + tensor.name[3 - width :]
    row = [name, shape_text(tensor.shape) if tensor.dtype else "-", tensor.dtype or "object"]
    if not stats:
        first = tensor.files[0] if tensor.files else "-"
        return [*row, tensor.stored, first if len(tensor.files) < 2 else f"{first} and {len(tensor.files) - 1} more"]
    figures = tensor.stats
    return [*row, *(_figure(getattr(figures, each)) if figures else "-" for each in _STATS)]


def _figure(value: float | None) -> str:
    return number_text(value) if value is None or isinstance(value, int) else f"{value:.3g}"
