"""What telemetry adds to a training step: steps with all of it and without any take turns on one model, in one process.

Three kinds of step are paired with a bare one: an ordinary step (loss by t in the reduction, a line of metrics.jsonl),
one that is shown (TensorBoard, console, memory of all ranks), one that measures all layers. Their costs are weighed by
how often a run makes them. The bare step has the loss as one sum and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import report
import torch
from torch import Tensor

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.dit.context_parallel import TokenLayout
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.config import AdamWConfig, PretrainConfig, TrainingConfig
from training.data import Batch
from training.fsdp import bare_model
from training.layer_norms import LayerProbe
from training.optimizer import build_optimizer, wrap_data_parallel
from training.telemetry import StepMetrics, Telemetry
from training.time_bins import TIME_BINS, bin_by_time, mean_by_time
from training.train_step import StepResult, train_step

CHANNELS, LLM_CHANNELS, CLIP_CHANNELS = 16, 128, 64
KINDS = ("ordinary", "shown", "layers")
# Of the configuration: training.log_every and telemetry.activation_norms_every.
SHOWN_EVERY, LAYERS_EVERY = 10, 100
QUANTITIES = ("wall_s", "cpu_s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results file."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    info = device.initialize()
    initialize_parallel(ParallelConfig(), seed=0, device_info=info)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            bench = Bench(options, info.device, Path(folder))
            rows = _measure(bench, options.pairs, options.warmup)
            parts = bench.parts(options.repeats)
    finally:
        destroy_parallel()
    summary = summarise(rows) | {"parts": parts}
    report.print_table([{"part": name, "ms": value} for name, value in parts.items()], ["part", "ms"])
    report.print_table(summary["costs"], ["step", "bare ms", *(f"{q} added ms" for q in QUANTITIES), "share %"])
    summary["overhead of the parts"] = overhead_of_parts(parts, options.micro_batches) / summary["bare_s"]["cpu_s"]
    for name in (*(f"overhead {quantity}" for quantity in QUANTITIES), "overhead of the parts"):
        print(f"{name}: {summary[name]:.3%} of a step")
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    report.write(options.out, settings, rows, summary)
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--grid", type=int, nargs=3, default=[3, 16, 24], metavar=("T", "H", "W"), help="latent grid")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=25, help="timed pairs of every kind of step")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them")
    parser.add_argument("--repeats", type=int, default=200, help="of every part timed alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "telemetry.json")
    return parser


@dataclass
class Clock:
    """One step's times."""

    wall_s: float
    cpu_s: float


class Bench:
    """A model in training with a telemetry that writes to `folder`."""

    def __init__(self, options: argparse.Namespace, place: torch.device, folder: Path) -> None:
        self.place, self.step, self.layers = place, 0, options.layers
        dit = DiTConfig(
            num_layers=options.layers,
            num_attention_heads=options.heads,
            attention_head_dim=options.head_dim,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            caption_channels=[LLM_CHANNELS, CLIP_CHANNELS],
        )
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        parallel = ParallelConfig()
        self.model = wrap_data_parallel(build_dit(dit, parallel, dtype, device=place, init_seed=0), parallel)
        self.optimizer = build_optimizer(self.model, AdamWConfig(), parallel)
        self.batches = [_batch(options.grid, dtype).to(place) for _ in range(options.micro_batches)]
        config = PretrainConfig(model=dit, training=TrainingConfig(steps=10**6))
        # Every step that is to be shown is shown: the bench decides which.
        self.telemetry = Telemetry(folder, config, 0, 10**6, log_every=1, peak_flops=1e12, active=True)
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if place.type == "cuda" else _nothing

    def bare(self) -> Clock:
        """A step without telemetry."""
        with mock.patch("training.train_step.bin_by_time", _one_sum):
            return self._timed(lambda: self._train(None))

    def with_telemetry(self, kind: str) -> Clock:
        """A step of one of KINDS."""
        # log_step shows multiples of it.
        self.telemetry.log_every = 1 if kind == "shown" else 10**7

        def run() -> None:
            probe = LayerProbe(self.model, self.optimizer) if kind == "layers" else None
            self.telemetry.log_step(_metrics(self.step, self._train(probe)))

        return self._timed(run)

    def parts(self, repeats: int) -> dict[str, float]:
        """Milliseconds of CPU time of every part alone, without the step around it; medians.

        The pairs say what telemetry adds to a step, as finely as the machine's noise lets them; these are fine.
        """
        result, probe = self._train(None), LayerProbe(self.model, self.optimizer)
        times, errors, positions = torch.rand(4), torch.rand(4), 100
        hidden, tokens = self._hidden()

        def measure_layers() -> None:
            probe.start()
            for layer in range(self.layers):
                probe._see_activation(f"layers.{layer}", hidden, tokens)
            probe.finish()

        def log(every: int) -> Callable[[], object]:
            def run() -> None:
                self.telemetry.log_every = every
                self.telemetry.log_step(_metrics(self.step, result))

            return run

        parts = {
            "loss by t, a micro-batch": lambda: bin_by_time(times, errors, positions),
            "the loss as one sum": lambda: _one_sum(times, errors, positions),
            "a line of metrics.jsonl": log(10**7),
            "a line, TensorBoard, console, memory": log(1),
            "sizes of all layers": measure_layers,
        }
        return {name: 1e3 * self._median_cpu_s(run, repeats) for name, run in parts.items()}

    def _median_cpu_s(self, run: Callable[[], object], repeats: int) -> float:
        return statistics.median(self._timed(run).cpu_s for _ in range(repeats))

    def _hidden(self) -> tuple[Tensor, TokenLayout]:
        """Hidden states of one micro-batch, and which tokens they are."""
        dit = bare_model(self.model[0])
        _, frames, _, height, width = self.batches[0].latents.shape
        tokens = frames * height * width
        hidden = torch.randn(tokens, 1, dit.config.hidden_size, dtype=dit.config.params_dtype, device=self.place)
        layout = dit._token_layout(dit._rope((frames, height, width), hidden))
        return hidden, layout

    def _train(self, probe: LayerProbe | None) -> StepResult:
        self.step += 1
        return train_step(self.model, self.optimizer, self.batches, probe=probe)

    def _timed(self, run: Callable[[], object]) -> Clock:
        self._synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self._synchronize()
        return Clock(time.perf_counter() - wall, time.process_time() - cpu)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the pairs' differences, and what they come to over many steps."""
    bare = {quantity: statistics.median(row["bare"][quantity] for row in rows) for quantity in QUANTITIES}
    added = {
        kind: {
            q: statistics.median(row["on"][q] - row["bare"][q] for row in rows if row["kind"] == kind)
            for q in QUANTITIES
        }
        for kind in KINDS
    }
    summary: dict[str, Any] = {"costs": [], "bare_s": bare}
    for kind in KINDS:
        costs = {f"{quantity} added ms": 1e3 * added[kind][quantity] for quantity in QUANTITIES}
        share = 100 * added[kind]["cpu_s"] / bare["cpu_s"]
        summary["costs"].append({"step": kind, "bare ms": 1e3 * bare["wall_s"], **costs, "share %": share})
    for quantity in QUANTITIES:
        ordinary, shown, layers = (added[kind][quantity] for kind in KINDS)
        # Shown and measured steps are ordinary ones with something on top.
        mean = ordinary + (shown - ordinary) / SHOWN_EVERY + (layers - ordinary) / LAYERS_EVERY
        summary[f"overhead {quantity}"] = mean / bare[quantity]
    return summary


def overhead_of_parts(parts: dict[str, float], micro_batches: int) -> float:
    """CPU seconds that the parts come to in a step of the mean run."""
    by_time, one_sum, line, shown, layers = parts.values()
    mean = (by_time - one_sum) * micro_batches + line + (shown - line) / SHOWN_EVERY + layers / LAYERS_EVERY
    return mean / 1e3


def _measure(bench: Bench, pairs: int, warmup: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair in range(warmup + pairs):
        for kind in KINDS:
            # Whoever goes first may find the caches otherwise: they take turns in that too.
            first = pair % 2 == 0
            on = bench.with_telemetry(kind) if first else None
            bare = bench.bare()
            on = on or bench.with_telemetry(kind)
            if pair >= warmup:
                rows.append({"kind": kind, "bare": vars(bare), "on": vars(on)})
    return rows


def _median_added(rows: Sequence[dict[str, Any]], kind: str, quantity: str) -> float:
    return statistics.median(row["on"][quantity] - row["bare"][quantity] for row in rows if row["kind"] == kind)


def _metrics(step: int, result: StepResult) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=1e-4,
        step_seconds=1.0,
        data_seconds=0.0,
        samples=1,
        tokens=1,
        flops=1.0,
        refused=result.refused,
        loss_by_time=mean_by_time(result.loss_sums_by_time, result.positions_by_time),
        positions_by_time=result.positions_by_time,
        layer_norms=result.layer_norms,
    )


def _one_sum(timestep: Tensor, errors: Tensor, positions: int) -> Tensor:
    """The loss without its parts: one sum and one count."""
    sums = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=errors.device)
    sums[0, 0], sums[1, 0] = errors.double().sum(), positions * len(errors)
    return sums


def _batch(grid: Sequence[int], dtype: torch.dtype) -> Batch:
    frames, height, width = grid
    latents = torch.randn(1, frames, CHANNELS, height, width)
    return Batch(
        latents=latents,
        timestep=torch.rand(1),
        llm_states=torch.randn(1, 64, LLM_CHANNELS, dtype=dtype),
        clip_states=torch.randn(1, 16, CLIP_CHANNELS, dtype=dtype),
        text_lengths=torch.tensor([80]),
        target=torch.randn_like(latents),
    )


def _nothing() -> None:
    return None


if __name__ == "__main__":
    main()
