"""One DiT block and a stack of them, forward and backward, at the paper's widths; ours against plain PyTorch.

FLOPs are those of `megatron_video.flops` (forward and twice that for backward, nothing for recomputation). MFU is their
rate over the device's peak; `of_ceiling` over what one large matrix product reached in the same run. `linears` rows
time the six linears on video tokens alone. Shard 8 is what one rank of tensor parallelism 8 computes between its
collectives: 6 of the 48 heads and an eighth of the feed-forward.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import report
import timing
import torch
from block_variants import VARIANTS, Case

from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from megatron_video.parallel import one_process

COLUMNS = (
    "variant", "part", "shard", "layers", "tokens", "ms", "forward_ms", "tflops", "mfu", "of_ceiling", "peak_gib",
    "weights_gib", "status",
)  # fmt: skip
# Dense bf16 TFLOP/s by a part of the device's name.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the results file; exit code 1 if a variant failed (not: ran out of memory)."""
    options = _parser().parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    ceiling = timing.matmul_tflops(device, dtype)
    peak = options.peak_tflops or _peak_tflops(device)
    size = timing.MATMUL_SIZE[device.type]
    print(
        f"ceiling: {ceiling:.4g} TFLOP/s ({size}^3 {options.dtype} matrix product); peak: {peak or 'unknown'} TFLOP/s"
    )
    rows = []
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    summary = {"matmul_ceiling_tflops": ceiling, "peak_tflops": peak}
    with one_process():
        for case in _cases(options):
            rows.append(_row(case, options, ceiling, peak))
            # One at a time: the machine may be taken away in the middle.
            print(*(f"{name}={value:.4g}" if isinstance(value, float) else value for name, value in rows[-1].items()))
            report.write(options.out, settings, rows, summary)
    report.print_table(rows, COLUMNS)
    print(f"written to {options.out}")
    if any(row["status"].startswith("failed") for row in rows):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2880, 8640, 25296, 75888])
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--head-dim", type=int, default=128, help="divides --hidden; a multiple of 8")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 8], help="tensor-parallel sizes, one rank's part")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4], help="blocks, one after the other")
    parser.add_argument("--text-tokens", type=int, default=256 + 77)
    parser.add_argument("--hidden-text", type=int, default=64, help="how many of them are padding; 0 for no mask")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=["block", "linears"], default=["block", "linears"])
    default = list(VARIANTS) if cuda else ["local", "plain"]
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=default)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--case-seconds", type=float, default=10, help="after so long, three repetitions are enough")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--peak-tflops", type=float, help="of the device at this dtype; default by its name")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "block.json")
    return parser


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    fixed = {name: getattr(options, name) for name in ("hidden", "head_dim", "text_tokens", "hidden_text", "batch")}
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    for shard in options.shards:
        for layers in options.layers:
            for tokens in options.tokens:
                for variant in options.variants:
                    for part in options.parts:
                        # The linears of a stack are those of one block over again.
                        if part == "block" or layers == min(options.layers):
                            yield Case(variant, part, shard, layers, tokens, dtype=dtype, device=device, **fixed)


def _row(case: Case, options: argparse.Namespace, ceiling: float, peak: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(case, name) for name in ("variant", "part", "shard", "layers", "tokens")}
    try:
        row |= _measure(case, options) | {"status": "ok"}
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except UserError as error:
        row["status"] = f"unavailable: {error}"
    # One variant that breaks must not cost the others their turn on a borrowed GPU.
    except Exception as error:
        traceback.print_exc()
        row["status"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
    _free(case.device)
    if row["status"] == "ok":
        row["tflops"] = _flops(case) / row["ms"] / 1e9
        row["of_ceiling"] = row["tflops"] / ceiling
        row["mfu"] = row["tflops"] / peak if peak else None
    return row


def _free(device: torch.device) -> None:
    # Modules refer to themselves, and compiled code to the modules it was made for.
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    variant = VARIANTS[case.variant]
    with variant.context():
        workload = variant.build(case)
        cuda = case.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        forward, backward = timing.part_seconds(
            workload.run, case.device, options.warmup, options.repeats, options.case_seconds
        )
        memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in workload.parameters) / 2**30
    return {"ms": (forward + backward) * 1e3, "forward_ms": forward * 1e3, "weights_gib": weights, **memory}


def _flops(case: Case) -> float:
    if case.part == "linears":
        # Without attention and text: 28 d^2 a token, three times for forward and backward.
        return 3 * 28 * case.batch * case.tokens * case.hidden**2 / case.shard
    whole = training_flops(case.layers, case.hidden, case.tokens, case.text_tokens)
    # Every matrix and every head is cut evenly, so are the FLOPs.
    return case.batch * whole / case.shard


def _peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


if __name__ == "__main__":
    main()
