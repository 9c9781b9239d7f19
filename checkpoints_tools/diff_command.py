"""`megatron-video ckpt diff`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_tools.diff import Diff, Options, TensorDiff, diff
from checkpoints_tools.forms import add_reading_options, reading_of
from checkpoints_tools.wording import dtype_text, number_text, plain, shape_text
from megatron_video.errors import UserError
from training.layout_matrix.report import text_table

DIFFERENT_EXIT_CODE = 1
_SHOWN = 30
_NAME_WIDTH = 60


def add_command(commands: Any) -> None:
    """The subcommand `diff`."""
    command = commands.add_parser(
        "diff",
        help="which tensors of two checkpoints differ, and by how much",
        description="Both in any form and layout, of one model; tensors by our names, streamed. Exit code 0: equal "
        "bit by bit, or within --tolerance; 1: different. --form is that of SECOND.",
    )
    command.add_argument("first", type=Path, metavar="FIRST")
    command.add_argument("second", type=Path, metavar="SECOND")
    command.add_argument("--tolerance", type=float, metavar="REL", help="largest relative L2 difference of a tensor")
    command.add_argument("--filter", action="append", default=[], metavar="GLOB", help="only tensors so named")
    command.add_argument("--ema", action="store_true", help="the moving averages, of every side that holds any")
    command.add_argument("--optimizer", action="store_true", help="also optimizer state and training state (both core)")
    command.add_argument("--all", action="store_true", help=f"list all tensors that differ, not the first {_SHOWN}")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    add_reading_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    tolerance = arguments.tolerance
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UserError(f"--tolerance {tolerance} must be a number of at least 0, such as 1e-3")
    options = Options(tolerance, tuple(arguments.filter), arguments.ema, arguments.optimizer)
    found = diff(arguments.first, arguments.second, options, reading_of(arguments))
    if arguments.json:
        print(json.dumps(as_json(found), allow_nan=False))
    else:
        print("\n".join(as_lines(found, None if arguments.all else _SHOWN)))
    return 0 if found.same else DIFFERENT_EXIT_CODE


def as_json(found: Diff) -> dict[str, Any]:
    """Everything; `equal`, `tensors` and `different` are an interface."""
    report: dict[str, Any] = {
        "equal": not found.different and not found.state,
        "same": found.same,
        "tolerance": found.options.tolerance,
        "tensors": len(found.tensors),
        "different": sorted(tensor.name for tensor in found.different),
        "first": found.first,
        "second": found.second,
        "details": [_tensor_json(tensor) for tensor in found.different],
        "groups": [asdict(group) for group in found.groups()],
        "config": [asdict(value) for value in found.config],
        "state": [asdict(value) for value in found.state],
    }
    return dict(plain(report))


def _tensor_json(tensor: TensorDiff) -> dict[str, Any]:
    sides = {
        side: None if template is None else {"shape": list(template.shape), "dtype": dtype_text(template.dtype)}
        for side, template in (("first", tensor.first), ("second", tensor.second))
    }
    figures = {} if tensor.difference is None else asdict(tensor.difference) | {"relative": tensor.difference.relative}
    return {"name": tensor.name, "verdict": tensor.verdict, **sides, **figures}


def as_lines(found: Diff, shown: int | None) -> Iterator[str]:
    """The report for 120 columns, with the `shown` largest differences."""
    for name, side in (("first", found.first), ("second", found.second)):
        yield f"{name + ':':<7} {side['path']} ({side['form']}), {side['tensors']}"
    different = found.different
    values = sum(t.difference.values for t in found.tensors if t.difference is not None)
    if not different:
        yield f"equal: {len(found.tensors)} tensors, {values:,} values, bit by bit"
    else:
        yield f"{len(different)} of {len(found.tensors)} tensors differ or lack a partner{_judged(found)}"
        yield ""
        yield _group_table(found)
        yield ""
        yield _tensor_table(different[:shown])
        if shown is not None and len(different) > shown:
            yield f"and {len(different) - shown} more; --all lists them, --json says all"
    for title, differing in (("training state", found.state), ("configuration", found.config)):
        if differing:
            yield ""
            yield text_table([title, "first", "second"], [[v.name, _cell(v.first), _cell(v.second)] for v in differing])


def _judged(found: Diff) -> str:
    tolerance = found.options.tolerance
    if tolerance is None:
        return ""
    beyond = sum(not tensor.within(tolerance) for tensor in found.tensors)
    return f"; {beyond} by more than {tolerance:g}" if beyond else f"; all are within {tolerance:g}"


def _group_table(found: Diff) -> str:
    rows = [
        [group.group, str(group.tensors), str(group.differing), number_text(group.relative), number_text(group.max_abs)]
        for group in found.groups()
        if group.differing
    ]
    return text_table(["module", "tensors", "differ", "relative L2", "max abs"], rows)


def _tensor_table(tensors: list[TensorDiff]) -> str:
    header = ["tensor", "what", "differ", "relative", "max abs", "cosine", "ULP"]
    return text_table(header, [_row(tensor) for tensor in tensors])


def _row(tensor: TensorDiff) -> list[str]:
    name = tensor.name if len(tensor.name) <= _NAME_WIDTH else "..." + tensor.name[3 - _NAME_WIDTH :]
    if tensor.difference is None or tensor.first is None or tensor.second is None:
        there = "" if tensor.verdict == "shape" else tensor.verdict + " "
        shapes = [_described(side) for side in (tensor.first, tensor.second) if side is not None]
        return [name, there + " | ".join(shapes), "-", "-", "-", "-", "-"]
    found = tensor.difference
    types = dict.fromkeys(dtype_text(side.dtype) for side in (tensor.first, tensor.second))
    share = f"{100 * found.differing / found.values:.3g}%" if found.values else "-"
    cosine = "-" if found.cosine is None else f"{found.cosine:.6f}"
    ulp = "-" if found.max_ulp is None else str(found.max_ulp)
    # Numbers of different signs are billions apart.
    ulp = ulp if len(ulp) < 7 else f"{found.max_ulp:.0e}"
    return [name, " | ".join(types), share, number_text(found.relative), number_text(found.max_abs), cosine, ulp]


def _described(template: Tensor) -> str:
    return f"{dtype_text(template.dtype)} {shape_text(template.shape)}"


def _cell(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
