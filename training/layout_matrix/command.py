"""Train a small model in every parallel layout and compare it with one process, tensor by tensor.

Starts its own ranks: on the CPU (gloo), or with one GPU each where there are GPUs (NCCL). Exit code 1 if anything is
above its tolerance.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.layout import Hardware
from training.layout_matrix.checkpoints import checkpoint_cases, cross_load, cross_load_summary, cross_load_table
from training.layout_matrix.refusals import refusals_report
from training.layout_matrix.report import (
    DTYPE_NAMES,
    FinishedReport,
    as_json,
    matrix_table,
    progress_line,
    summary,
    text_table,
)
from training.layout_matrix.runner import Outcome, run_matrix
from training.layout_matrix.selection import Row, named_rows, rows_for
from training.layout_matrix.table import LAYOUTS, STEPS, Dtype, LayoutCase, Workload
from training.local_ranks import RankPool, default_device

_DTYPES: dict[str, tuple[Dtype, ...]] = {
    "fp32": ("float32",),
    "bf16": ("bfloat16",),
    "both": ("float32", "bfloat16"),
}


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for; 0 if everything agrees, 1 if not."""
    arguments = _parser().parse_args(argv)
    for path in filter(None, (arguments.json, arguments.report)):
        if not path.absolute().parent.is_dir():  # told before the run, not after it
            raise UserError(f"{path}: its folder does not exist")
    arguments.device = arguments.device or default_device()
    if arguments.max_ranks is None:
        arguments.max_ranks = 8 if arguments.device == "cpu" else torch.cuda.device_count()
    if arguments.refusals:
        return _write(arguments, refusals_report())
    if arguments.checkpoints:
        return _run_checkpoints(arguments)
    rows, left_out = _choose(arguments)
    if arguments.list:
        print(_listing(rows))
        print(_left_out(left_out, arguments).strip())
        return 0
    return _run(arguments, rows, left_out)


def _choose(arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    hardware = Hardware() if arguments.device == "cpu" else Hardware.detect()
    rows, left_out = rows_for(hardware, _DTYPES[arguments.dtype], arguments.max_ranks, arguments.short)
    if arguments.layouts:
        rows, left_out = named_rows(rows, left_out, arguments.layouts), []
    if not rows:
        raise UserError(f"no layout is left with --max-ranks {arguments.max_ranks} and the other options")
    return rows, left_out


def _run(arguments: argparse.Namespace, rows: list[Row], left_out: list[str]) -> int:
    with RankPool(max(case.ranks for case, _ in rows), arguments.device) as pool:
        scope = f"{len(rows)} layouts of up to {pool.size} ranks on {_machine(pool)}"
        heading = f"{scope}\n{_work()}{_left_out(left_out, arguments)}"
        print(heading, flush=True)
        outcomes = _with_progress(pool, rows)
    found = FinishedReport("Layout matrix", heading, summary(outcomes), as_json(outcomes))
    found.wrong = any(outcome.wrong for outcome in outcomes)
    for dtype in dict.fromkeys(dtype for _, dtype in rows):
        tables = [matrix_table(outcomes, dtype, markdown) for markdown in (False, True)]
        found.add(f"{DTYPE_NAMES[dtype]}: largest relative errors", *tables)
    return _write(arguments, found)


def _run_checkpoints(arguments: argparse.Namespace) -> int:
    writers, readers = checkpoint_cases(arguments.short, arguments.max_ranks, arguments.layouts or ())
    if not writers or not readers:
        raise UserError(f"no layout is left with --max-ranks {arguments.max_ranks}")
    with RankPool(max(case.ranks for case in (*writers, *readers)), arguments.device) as pool:
        heading = (
            f"{len(writers)} x {len(readers)} layouts on {_machine(pool)}\na save, and one more step, after {_work()}"
        )
        print(heading, flush=True)
        with tempfile.TemporaryDirectory(prefix="layouts_") as folder:
            cells = cross_load(pool, Path(folder), writers, readers, _tell)
    values = [asdict(cell) for cell in cells]
    found = FinishedReport("Checkpoint cross-load", heading, cross_load_summary(cells), values)
    found.wrong = any(cell.wrong for cell in cells)
    found.add("largest relative error after one more step", cross_load_table(cells), cross_load_table(cells, True))
    return _write(arguments, found)


def _write(arguments: argparse.Namespace, found: FinishedReport) -> int:
    for title, table, _ in found.tables:
        print(f"\n{title}\n\n{table}")
    print(f"\n{found.summary}")
    if arguments.json:
        arguments.json.write_text(found.json() + "\n", encoding="utf-8")
    if arguments.report:
        arguments.report.write_text(found.markdown() + "\n", encoding="utf-8")
    return 1 if found.wrong else 0


def _with_progress(pool: RankPool, rows: list[Row]) -> list[Outcome]:
    width = max(len(case.name) for case, _ in rows)
    done = 0

    def tell(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        print(progress_line(outcome, done, len(rows), width), flush=True)

    return run_matrix(pool, rows, tell)


def _tell(line: str) -> None:
    print(line, flush=True)


def _machine(pool: RankPool) -> str:
    place = f"{torch.cuda.get_device_name()} (NCCL)" if pool.device == "cuda" else f"{os.cpu_count()} CPU cores (gloo)"
    return f"{place}; torch {torch.__version__}, Python {platform.python_version()}"


def _work() -> str:
    work = Workload()
    samples = sum(shape[3] for shape in work.shapes)
    return (
        f"{STEPS} AdamW steps with clipping and EMA; {len(work.shapes)} micro-batches of images and videos, "
        f"{samples} samples, captions of different lengths\n"
        "copies of a tensor on several ranks must be equal bit for bit"
    )


def _left_out(names: list[str], arguments: argparse.Namespace) -> str:
    """A line each for layouts that are too large and for those that this hardware does not run."""
    larger = [case.name for case in LAYOUTS if case.name in names and case.ranks > arguments.max_ranks]
    others = [name for name in names if name not in larger]
    text = f"\nleft out: {len(larger)} layouts of more than {arguments.max_ranks} ranks" if larger else ""
    if others:
        text += f"\nleft out, for GPUs with Transformer Engine: {len(others)} layouts ({others[0]} to {others[-1]})"
    return text


def _listing(rows: list[Row]) -> str:
    header = ["layout", "ranks", "dtypes", "short form", "what is set"]
    by_case: dict[str, list[Row]] = {}
    for case, dtype in rows:
        by_case.setdefault(case.name, []).append((case, dtype))
    lines = []
    for name, found in by_case.items():
        case = found[0][0]
        short = [DTYPE_NAMES[dtype] for _, dtype in found if case.is_short(dtype)]
        dtypes = ", ".join(DTYPE_NAMES[dtype] for _, dtype in found)
        lines.append([name, str(case.ranks), dtypes, ", ".join(short), _settings(case)])
    return text_table(header, lines)


def _settings(case: LayoutCase) -> str:
    replicas = {"replicas": case.data_parallel_size} if case.data_parallel_size > 1 else {}
    single = {"single_samples": True} if case.single_samples else {}
    values = {**case.parallel, **replicas, **single, **case.changes}
    return ", ".join(f"{_shorter(name)}={value}" for name, value in values.items() if value is not None)


def _shorter(name: str) -> str:
    for long, short in (("tensor_model", "tp"), ("virtual_pipeline_model", "vpp"), ("pipeline_model", "pp")):
        name = name.replace(f"{long}_parallel_size", short)
    return name.replace("context_parallel_size", "cp")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-video test-layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="show the layouts and end")
    parser.add_argument(
        "--checkpoints", action="store_true", help="save in every layout, load in every other, and go on"
    )
    parser.add_argument("--refusals", action="store_true", help="show which layouts cannot work, and why")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="only these (names as --list shows them)")
    parser.add_argument(
        "--max-ranks", type=int, metavar="N", help="leave out larger ones (default: 8, or the number of GPUs)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="both", help="default: both")
    parser.add_argument("--short", action="store_true", help="the part that the default tests run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the tables there as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
