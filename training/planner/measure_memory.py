"""The planner's memory beside that of real runs on this machine, for docs/planner/measured_memory.md.

On a machine with GPUs it measures on these, as many layouts as they allow; on a CPU the largest layout needs eight
processes of about 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from training.local_ranks import Device, RankPool, default_device
from training.planner.measured_layouts import (
    LAYOUTS,
    SIZES,
    TEXT_TOKENS,
    MeasuredLayout,
    Size,
    run_config,
    write_shards,
)
from training.planner.measured_run import Compared, compare
from training.planner.tables import Formats, Table, number, signed

_PROJECT = Path(__file__).parents[2]
TOLERANCE_PERCENT = 5.0
_MB = 1e6
_WHAT = (
    "Each row is a training run of two steps through the real trainer; measured is the second. `peak` is the most that "
    "tensors hold at one moment of the step, `state` what they hold between backward and update: weights, gradients, "
    "optimizer and averages. Residuals are those of the prediction. Every rank was measured; a row shows the one that "
    "is furthest from its prediction, the other columns are parts of that prediction. Batches that wait for their "
    "step are left out: they lie in host memory."
)
_LEFT = (
    "What is left: buffers of fixed size in torch's CPU kernels (bf16 attention takes 1 to 2 MB backward, whatever the "
    "layout), copies that gloo makes of what it sends and gathers, and the 0.15 MB matrix of the straggler watch."
)
_HOW: dict[Device, str] = {
    "cpu": "Measured on the CPU by torch's allocator (`training/planner/memory_trace.py`), gloo between ranks, plain "
    "torch in the place of the fused kernels; the planner is told so and uses the formulas of every other job.",
    "cuda": "Measured on the GPU by torch's caching allocator (`torch.cuda.max_memory_allocated`), with fused kernels.",
}


def measure_layout(layout: MeasuredLayout, device: Device) -> list[Compared]:
    """Every rank of one layout, in processes of its own."""
    size = SIZES[device]
    with tempfile.TemporaryDirectory(prefix="measured_memory_") as name:
        write_shards(Path(name), size)
        config = run_config(layout, size, Path(name))
        if device == "cuda":
            # Read once, when CUDA starts; Megatron-FSDP and the other layouts want different ones.
            os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if config.parallel.use_megatron_fsdp else "1"
        with RankPool(layout.ranks, device) as pool:
            return compare(pool, config, layout.ranks, TEXT_TOKENS)


def row_of(layout: MeasuredLayout, compared: Sequence[Compared]) -> dict[str, Any]:
    """A row of the table: the rank furthest from its prediction."""
    worst = max(compared, key=lambda found: abs(found.residual_percent))
    predicted, measured = worst.predicted, worst.measured
    return {
        "layout": layout.name,
        "type": layout.precision,
        "ranks": layout.ranks,
        "rank": worst.rank,
        "state": predicted.model_state / _MB,
        **{name: value / _MB for name, value in predicted.by_part().items()},
        "state_measured": measured.state / _MB,
        "state_residual": worst.state_residual_percent,
        "peak": predicted.total / _MB,
        "peak_measured": measured.peak / _MB,
        "phase": measured.phase.replace("_", " "),
        "residual": worst.residual_percent,
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Peaks and parts."""
    mb, percent = number(2), signed(2)
    formats: Formats = {
        "layout": str,
        "type": str,
        "ranks": str,
        "rank": str,
        "peak": mb,
        "peak_measured": mb,
        "residual": percent,
        "state": mb,
        "state_measured": mb,
        "state_residual": percent,
        "activations": mb,
        "workspace": mb,
        "communication": mb,
    }
    heads = {"residual": "residual %", "state_residual": "state residual %"}
    return Table("Memory of a rank in MB, predicted and measured", rows, formats, heads)


def page(rows: Sequence[dict[str, Any]], left_out: Sequence[MeasuredLayout], device: Device, out: Path) -> str:
    """The document."""
    size = SIZES[device]
    largest = max(abs(row["residual"]) for row in rows)
    parts = [
        "# The planner's memory beside measured memory",
        f"Written by `python -m training.planner.measure_memory --out {_shown(out)}`.",
        _WHAT,
        f"{_HOW[device]} {_where(device)}; {_model(size)}.",
        f"{len(rows)} layouts; largest residual of a peak {largest:.2f} %, of any rank.",
        table_of(rows).markdown(),
        *([_LEFT] if device == "cpu" else []),
    ]
    if left_out:
        parts.append("Not measured: " + ", ".join(f"{layout.name} {layout.precision}" for layout in left_out) + ".")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> int:
    """Measure, write, and print; 1 if a peak is further off than the tolerance."""
    arguments = _parse(argv)
    device: Device = arguments.device or default_device()
    layouts = _chosen(arguments.only)
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise UserError(f"--out {arguments.out}: there is no folder {arguments.out.absolute().parent}; make it first")
    most = torch.cuda.device_count() if device == "cuda" else max(layout.ranks for layout in layouts)
    rows, ranks, left = [], [], list(layouts)
    for layout in (layout for layout in layouts if layout.ranks <= most):
        compared = measure_layout(layout, device)
        left.remove(layout)
        rows.append(row_of(layout, compared))
        ranks.append({"layout": layout.name, "type": layout.precision, "ranks": [_values(one) for one in compared]})
        print(f"{layout.name} {layout.precision}: {rows[-1]['residual']:+.2f} %", file=sys.stderr, flush=True)
        # After every layout: minutes of work are not lost to the one that fails.
        if arguments.out is not None:
            _write(arguments.out, page(rows, left, device, arguments.out), {"device": _where(device), "layouts": ranks})
    if not rows:
        raise UserError(f"none of the chosen layouts runs on {most} GPUs; choose others with --only, or --device cpu")
    print(json.dumps(ranks, indent=1) if arguments.json else table_of(rows).text())
    return 0 if all(abs(row["residual"]) <= TOLERANCE_PERCENT for row in rows) else 1


def _write(out: Path, text: str, values: dict[str, Any]) -> None:
    write_atomically(out, text.encode())
    write_atomically(out.with_suffix(".json"), json.dumps(values, indent=1).encode())


def _chosen(only: str | None) -> list[MeasuredLayout]:
    chosen = [layout for layout in LAYOUTS if only is None or only.lower() in layout.name.lower()]
    if not chosen:
        names = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        raise UserError(f"--only {only}: no such layout; there are {names}")
    return chosen


def _values(compared: Compared) -> dict[str, Any]:
    return {
        "rank": compared.rank,
        "stage": compared.stage,
        "predicted": compared.predicted.by_part() | {"total": compared.predicted.total},
        "measured": asdict(compared.measured),
        "residual_percent": compared.residual_percent,
        "state_residual_percent": compared.state_residual_percent,
    }


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(_PROJECT) if path.is_relative_to(_PROJECT) else path)


def _where(device: Device) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    return f"{name}, torch {torch.__version__}"


def _model(size: Size) -> str:
    micro_batches = "two micro-batches a replica, or four where there are stages"
    return f"4 blocks of width {size.heads * size.head_dim}, samples of {size.bucket}, {micro_batches}"


def _parse(argv: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.planner.measure_memory",
        description="Compare the memory that the planner predicts with that of short real runs, layout by layout.",
        epilog="Exit code 1: a peak is off by more than 5 %.",
    )
    parser.add_argument("--only", metavar="WORDS", help="layouts whose name contains these words, such as 'VPP2'")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, help="page to write, with a .json of every rank beside it")
    parser.add_argument("--json", action="store_true", help="print every rank's figures as JSON instead of the table")
    return parser.parse_args(list(argv))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
