"""Train a small model in every parallel layout and compare it with one process, tensor by tensor.

Starts its own ranks: on the CPU (gloo), or with one GPU each where there are GPUs (NCCL). Exit code 1 if anything is
above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from training.layout_matrix.report import (
    DTYPE_NAMES,
    as_json,
    matrix_table,
    progress_line,
    summary,
    text_table,
)
from training.layout_matrix.runner import Outcome, run_matrix
from training.layout_matrix.table import LAYOUTS, STEPS, Dtype, LayoutCase, Workload
from training.local_ranks import RankPool

Row = tuple[LayoutCase, Dtype]
_DTYPES: dict[str, tuple[Dtype, ...]] = {
    "fp32": ("float32",),
    "bf16": ("bfloat16",),
    "both": ("float32", "bfloat16"),
}


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for; 0 if everything agrees, 1 if not."""
    arguments = _parser().parse_args(argv)
    rows = select_rows(arguments)
    if arguments.list:
        print(_listing(rows))
        return 0
    return _run(arguments, rows)


def select_rows(arguments: argparse.Namespace) -> list[Row]:
    """The rows of the table that the arguments choose.

    Raises:
        UserError: a name that is not in the table, or nothing left.
    """
    known = {case.name: case for case in LAYOUTS}
    unknown = [name for name in arguments.layouts or () if name not in known]
    if unknown:
        raise UserError(f"--layouts {' '.join(unknown)}: not in the table; --list shows the names")
    cases = [known[name] for name in arguments.layouts] if arguments.layouts else list(LAYOUTS)
    cases = [case for case in cases if case.ranks <= arguments.max_ranks]
    rows = [(case, dtype) for dtype in _DTYPES[arguments.dtype] for case in cases]
    if arguments.short:
        rows = [(case, dtype) for case, dtype in rows if (case.short if dtype == "float32" else case.short_bf16)]
    if not rows:
        raise UserError(f"no layout is left with --max-ranks {arguments.max_ranks} and the other options")
    return rows


def _run(arguments: argparse.Namespace, rows: list[Row]) -> int:
    with RankPool(max(case.ranks for case, _ in rows), arguments.device) as pool:
        heading = _heading(rows, pool)
        print(heading, flush=True)
        outcomes = _with_progress(pool, rows)
    tables = {dtype: f"{DTYPE_NAMES[dtype]}, largest relative errors" for _, dtype in rows}
    for dtype, title in tables.items():
        print(f"\n{title}\n\n{matrix_table(outcomes, dtype)}")
    print(f"\n{summary(outcomes)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"heading": heading, "layouts": as_json(outcomes)}, indent=1) + "\n")
    if arguments.report:
        parts = [f"## {title}\n\n{matrix_table(outcomes, dtype, markdown=True)}" for dtype, title in tables.items()]
        text = "\n\n".join(["# Layout matrix", heading, *parts, summary(outcomes)])
        arguments.report.write_text(text + "\n", encoding="utf-8")
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


def _with_progress(pool: RankPool, rows: list[Row]) -> list[Outcome]:
    width = max(len(case.name) for case, _ in rows)
    done = 0

    def tell(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        print(progress_line(outcome, done, len(rows), width), flush=True)

    return run_matrix(pool, rows, tell)


def _heading(rows: list[Row], pool: RankPool) -> str:
    work = Workload()
    samples = sum(shape[3] for shape in work.shapes)
    place = f"{torch.cuda.get_device_name()} (NCCL)" if pool.device == "cuda" else f"{os.cpu_count()} CPU cores (gloo)"
    return (
        f"{len(rows)} layouts of up to {pool.size} ranks on {place}; torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
        f"{STEPS} AdamW steps with clipping and EMA; {len(work.shapes)} micro-batches of images and videos, "
        f"{samples} samples, captions of different lengths"
    )


def _listing(rows: list[Row]) -> str:
    header = ["layout", "ranks", "dtypes", "short form", "what is set"]
    by_case: dict[str, list[Row]] = {}
    for case, dtype in rows:
        by_case.setdefault(case.name, []).append((case, dtype))
    lines = []
    for name, found in by_case.items():
        case = found[0][0]
        short = [DTYPE_NAMES[dtype] for _, dtype in found if (case.short if dtype == "float32" else case.short_bf16)]
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
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="only these (names as --list shows them)")
    parser.add_argument("--max-ranks", type=int, default=8, metavar="N", help="leave out larger ones (default: 8)")
    parser.add_argument("--dtype", choices=_DTYPES, default="both", help="default: both")
    parser.add_argument("--short", action="store_true", help="the part that the default tests run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the tables there as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
