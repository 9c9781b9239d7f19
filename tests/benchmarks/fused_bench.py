"""The fused operations of a DiT block: plain torch, torch.compile and our kernels, forward and backward.

GB/s counts what the operation cannot do without: every large input read and every large result written once, forward
and backward. So a form that goes over its data three times shows a third of the memory's bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import timing
import torch
from torch import Tensor

from megatron_video.dit import fused
from megatron_video.dit.rope import build_rope

FORMS = ("plain", "compiled", "kernel")
COLUMNS = ("operation", "tokens", "form", "ms", "forward_ms", "gb_per_s", "speedup", "kept_mib", "status")


@dataclass(frozen=True)
class Operation:
    """One of the fused operations with its inputs; the first is as large as the tokens."""

    name: str
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    passes: int
    """Tensors of the size of the tokens that must be read or written, forward and backward together."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results file."""
    options = _parser().parse_args(arguments)
    rows = []
    for tokens in options.tokens:
        for operation in _operations(options, tokens):
            rows += list(_rows(operation, tokens, options))
    report.print_table(rows, COLUMNS)
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    report.write(options.out, settings, rows, {})
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2880, 8640, 25296, 75888])
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--head-dim", type=int, default=128, help="divides --hidden")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS) if cuda else ["plain"])
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "fused.json")
    return parser


def _operations(options: argparse.Namespace, tokens: int) -> Iterator[Operation]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    width, batch, channels = options.hidden, options.batch, options.head_dim
    heads = width // channels

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    x, branch = random(tokens, batch, width), random(tokens, batch, width)
    weight, bias = random(width), random(width)
    shift, scale = random(1, batch, width), random(1, batch, width)
    norm = (lambda *inputs: fused.modulated_layer_norm(*inputs, 1e-5), _plain_norm)
    # x and y; g, x and dx.
    yield Operation("modulated LayerNorm", *norm, [x, weight, bias, shift, scale], passes=5)
    # x, branch and y; g, branch and its gradient; the gradient of x is g itself.
    yield Operation("gated residual", fused.gated_residual, fused.plain_gated_residual, [x, shift, branch], passes=6)
    rope = build_rope((tokens, 1, 1), (channels // 2, channels // 4, channels // 4), dtype, device, False)
    head_weight, queries = random(channels), x.detach().view(tokens, batch, heads, channels).requires_grad_()
    rotated = (
        lambda x, weight: fused.rotated_rms_norm(x, weight, 1e-6, rope),
        lambda x, weight: fused.plain_rotated_rms_norm(x, weight, 1e-6, rope),
    )
    yield Operation("RMSNorm + RoPE-3D", *rotated, [queries, head_weight], passes=5)
    unrotated = (
        lambda x, weight: fused.rms_norm(x, weight, 1e-6),
        lambda x, weight: fused.plain_rms_norm(x, weight, 1e-6),
    )
    yield Operation("RMSNorm", *unrotated, [queries, head_weight], passes=5)


def _plain_norm(*inputs: Tensor) -> Tensor:
    return fused.plain_modulated_layer_norm(*inputs, 1e-5)


def _rows(operation: Operation, tokens: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    plain_ms = None
    for form in options.forms:
        row: dict[str, Any] = {"operation": operation.name, "tokens": tokens, "form": form}
        try:
            row |= _measure(operation, form, options)
        # A compiler that fails is a result, and the other forms are still wanted.
        except Exception as error:
            yield row | {"status": f"failed: {type(error).__name__}: {str(error)[:200]}"}
            continue
        plain_ms = row["ms"] if form == "plain" else plain_ms
        yield row | {"speedup": plain_ms / row["ms"] if plain_ms else None, "status": "ok"}


def _measure(operation: Operation, form: str, options: argparse.Namespace) -> dict[str, Any]:
    device, inputs = torch.device(options.device), operation.inputs
    function = _function(operation, form)
    incoming = torch.randn_like(operation.inputs[0]).detach()

    def run(mark: Callable[[], None]) -> None:
        out = function(*inputs)
        mark()
        torch.autograd.grad(out, inputs, incoming)

    with fused.without_kernels() if form == "plain" else nullcontext():
        forward, backward = timing.part_seconds(run, device, options.warmup, options.repeats)
        kept = _kept_mib(lambda: function(*inputs), device)
    moved = operation.passes * inputs[0].numel() * inputs[0].element_size()
    total = forward + backward
    times = {"ms": total * 1e3, "forward_ms": forward * 1e3}
    return {**times, "gb_per_s": moved / total / 1e9, "kept_mib": kept}


def _function(operation: Operation, form: str) -> Callable[..., Tensor]:
    if form == "compiled":
        torch._dynamo.reset()
        return torch.compile(operation.plain, dynamic=False)
    if form == "kernel" and not fused.has_kernels(operation.inputs[0]):
        raise RuntimeError("the kernels need CUDA and triton; without them the fused operations are plain torch")
    return operation.fused if form == "kernel" else operation.plain


def _kept_mib(run: Callable[[], Tensor], device: torch.device) -> float | None:
    """Memory that backward will need beyond inputs and output."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    out = run()
    return (torch.cuda.memory_allocated() - before - out.numel() * out.element_size()) / 2**20


if __name__ == "__main__":
    main()
