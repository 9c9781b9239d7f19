"""What preference training costs, beside pretraining on as many rows: step time, memory, and the reference's own pass.

Four runs of the real trainer are built in one process (and in the processes of a layout) and take turns, step by step:
pretraining on 2b samples, which is two forward-backward passes of b; DPO on b pairs with the reference's errors
precomputed; with its weights swapped in; and with a second model beside the first, as one would write it plainly. The
pass that precomputes the errors takes its turn too. Memory is that of each run alone, by torch's allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch
import torch.distributed as dist
from resident_reference import resident_reference

from megatron_video.buckets import parse_bucket
from megatron_video.config_io import load_config
from megatron_video.device import initialize
from megatron_video.parallel import destroy_parallel, initialize_parallel
from megatron_video.shard_schema import DatasetInfo, ShardSample, shard_name
from megatron_video.shards import ShardWriter, finish_dataset, write_null_text
from training.build_trainer import build_trainer
from training.config import PretrainConfig
from training.data_set import TrainingData
from training.local_ranks import RankPool
from training.phases import Phases
from training.planner.measured_run import measure
from training.pretrain import run_training
from training.rank_table import gather_rank_table
from training.reference_pass import forward_errors
from training.train_step import train_step
from training.trainer import Trainer

CHANNELS, LLM_CHANNELS, CLIP_CHANNELS, LLM_TOKENS, CLIP_TOKENS = 16, 64, 48, 48, 16
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
}
PRETRAINING, PRECOMPUTED, SWAPPED, RESIDENT = "pretraining", "precomputed", "swapped", "resident"
WAYS = (PRETRAINING, PRECOMPUTED, SWAPPED, RESIDENT)
PASS = "pass"
TARGETS = {"step": 1.1, "memory": 1.05}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the results file."""
    options = _parser().parse_args(arguments)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"targets": TARGETS, "layouts": {}}
    with tempfile.TemporaryDirectory() as name, RankPool(2, "cpu") as pool:
        folder = Path(name)
        _prepare(folder, options, pool)
        for layout in options.layouts:
            ranks, parallel = LAYOUTS[layout]
            configs = {way: _config(way, folder, options, parallel, layout) for way in _ways(layout)}
            shares = pool.run(measure_times, configs, options.steps, options.warmup, ranks=ranks, timeout_seconds=3600)
            times = [{"layout": layout, **row} for row in _over_ranks(shares)]
            memory = _without_host({way: _memory(pool, config, ranks) for way, config in configs.items()})
            rows += times
            summary["layouts"][layout] = _summary(times, memory)
            report.print_table(_table(layout, summary["layouts"][layout]), _COLUMNS)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    report.write(options.out, settings, rows, summary)
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--bucket", default="34x128x256", help="frames x height x width of every video")
    parser.add_argument("--pairs", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, default=report.RESULTS / "preference.json")
    return parser


def _ways(layout: str) -> tuple[str, ...]:
    # The plain second model knows nothing of stages.
    return WAYS[:-1] if layout == "PP2" else WAYS


def _config(way: str, folder: Path, options: argparse.Namespace, parallel: list[str], layout: str) -> PretrainConfig:
    pairs, rows = options.pairs, 2 * options.pairs
    samples = rows if way == PRETRAINING else pairs
    overrides = [
        f"run.output_dir={folder / 'runs' / layout.replace(' ', '_') / way}",
        f"run.initial_weights={folder / 'base'}",
        f"data.micro_batch_size={samples}",
        f"data.global_batch_size={options.micro_batches * samples}",
        f"data.shards=[{folder / ('samples' if way == PRETRAINING else 'pairs')}]",
        *parallel,
    ]
    if way != PRETRAINING:
        overrides += ["run.stage=dpo", f"dpo.reference={SWAPPED if way == SWAPPED else PRECOMPUTED}"]
    return load_config(PretrainConfig, None, [*_common(options), *overrides])


def _common(options: argparse.Namespace) -> list[str]:
    return [
        f"data.buckets=[{options.bucket}]",
        "data.text_dropout=0.0",
        f"model.num_attention_heads={options.heads}",
        f"model.attention_head_dim={options.head_dim}",
        f"model.num_layers={options.layers}",
        f"model.in_channels={CHANNELS}",
        f"model.out_channels={CHANNELS}",
        f"model.caption_channels=[{LLM_CHANNELS},{CLIP_CHANNELS}]",
        "training.precision=fp32",
        # The optimizer's moments are there from the second step on.
        "training.steps=2",
        "optimizer.warmup_steps=0",
        "faults.hang_seconds=null",
    ]


def _prepare(folder: Path, options: argparse.Namespace, pool: RankPool) -> None:
    """Samples, pairs, and the run that both start from."""
    _write_shards(folder / "samples", options.bucket, pairs=False)
    _write_shards(folder / "pairs", options.bucket, pairs=True)
    base = [f"run.output_dir={folder / 'base'}", f"data.shards=[{folder / 'samples'}]", "data.global_batch_size=1"]
    pool.run(_pretrain, load_config(PretrainConfig, None, [*_common(options), *base]), ranks=1)


def _pretrain(config: PretrainConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run_training(config, keep_distributed=True)


def _write_shards(folder: Path, name: str, pairs: bool) -> None:
    """Videos of noise, all with texts of one length."""
    generator, bucket = torch.Generator().manual_seed(0), parse_bucket(name)
    frames, height, width = bucket.latent_shape
    channels = CHANNELS if pairs else 2 * CHANNELS

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with ShardWriter(folder, shard_name(0)) as writer:
        for number in range(8):
            video, loser = (random(frames, channels, height, width) for _ in range(2))
            llm, clip = random(LLM_TOKENS, LLM_CHANNELS), random(CLIP_TOKENS, CLIP_CHANNELS)
            metadata = {"caption": "noise", "fps": 24.0}
            writer.add(ShardSample(f"{number}", video, llm, clip, metadata, loser=loser if pairs else None), bucket)
    write_null_text(folder, torch.zeros(1, LLM_CHANNELS), torch.zeros(CLIP_TOKENS, CLIP_CHANNELS))
    info = DatasetInfo("noise", "noise", CHANNELS, LLM_CHANNELS, CLIP_CHANNELS, CLIP_TOKENS, pairs=pairs)
    finish_dataset(folder, info)


def measure_times(configs: dict[str, PretrainConfig], steps: int, warmup: int) -> list[dict[str, Any]]:
    """On every rank: a row for every step, with wall and CPU seconds of each kind of work on this rank."""
    device, any_config = initialize(), configs[PRETRAINING]
    initialize_parallel(any_config.parallel, any_config.run.seed, device)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            works = {way: _work(_build(way, config)) for way, config in configs.items()}
        works[PASS] = works[PRECOMPUTED][1], works[PRECOMPUTED][1]
        return [_turn({way: work[0] for way, work in works.items()}, step) for step in range(warmup + steps)][warmup:]
    finally:
        destroy_parallel(keep_distributed=True)


def _build(way: str, config: PretrainConfig) -> Trainer:
    device = initialize()
    data = TrainingData.open(config.data, pairs=way != PRETRAINING)
    with resident_reference() if way == RESIDENT else contextlib.nullcontext():
        return build_trainer(config, data, device, Phases(device.device), gather_rank_table())


def _work(trainer: Trainer) -> tuple[Callable[[], object], Callable[[], object]]:
    """One training step, and the forward pass of a reference over the same batches."""
    batches = next(iter(trainer.steps_from_here())).batches
    trainer.next_learning_rate()

    def step() -> None:
        train_step(trainer.model, trainer.optimizer, trainer.with_reference(batches), phases=trainer.phases)

    return step, lambda: forward_errors(batches, trainer.model)


def _turn(works: dict[str, Callable[[], object]], number: int) -> dict[str, Any]:
    """Each once, in an order that turns round, so that a busy spell hits all alike."""
    names = list(works)
    names = names[number % len(names) :] + names[: number % len(names)]
    return {name: _timed(works[name]) for name in names}


def _timed(work: Callable[[], object]) -> dict[str, float]:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    # Before the other ranks are waited for, which costs CPU time of its own.
    cpu = time.process_time() - cpu
    dist.barrier()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu}


def _over_ranks(shares: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Wall time of the first rank, CPU time of all."""
    return [
        {
            name: {"wall_s": ranks[0][name]["wall_s"], "cpu_s": sum(rank[name]["cpu_s"] for rank in ranks)}
            for name in ranks[0]
        }
        for ranks in zip(*shares, strict=True)
    ]


def measure_memory(way: str, config: PretrainConfig) -> dict[str, float]:
    """MB of one run alone: at the peak of its last step, and between backward and update."""
    built = resident_reference() if way == RESIDENT else contextlib.nullcontext()
    with contextlib.redirect_stderr(io.StringIO()), built:
        found = measure(config)
    return {"peak": found.peak / 1e6, "state": found.state / 1e6}


def _memory(pool: RankPool, config: PretrainConfig, ranks: int) -> dict[str, float]:
    way = Path(config.run.output_dir).name
    shares = pool.run(measure_memory, way, config, ranks=ranks, timeout_seconds=1200)
    return max(shares, key=lambda share: float(share["peak"]))


def _without_host(memory: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """On a CPU, weights that wait in host memory lie beside all others: what a swapped run holds more is told apart."""
    host = memory[SWAPPED]["state"] - memory[PRECOMPUTED]["state"]
    return {
        way: {**found, "host": host, "peak": found["peak"] - host} if way == SWAPPED else found
        for way, found in memory.items()
    }


_COLUMNS = ("layout", "kind", "wall ratio", "cpu ratio", "peak MB", "peak ratio", "host MB")


def _summary(rows: list[dict[str, Any]], memory: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Medians of the pairs' ratios to pretraining on as many rows."""
    found: dict[str, Any] = {}
    for kind in rows[0].keys() - {"layout"}:
        ratios = {
            quantity: statistics.median(row[kind][quantity] / row[PRETRAINING][quantity] for row in rows)
            for quantity in ("wall_s", "cpu_s")
        }
        medians = {f"median {quantity}": statistics.median(row[kind][quantity] for row in rows) for quantity in ratios}
        found[kind] = {"ratio": ratios, **medians}
        if kind in memory:
            found[kind]["memory"] = memory[kind] | {"ratio": memory[kind]["peak"] / memory[PRETRAINING]["peak"]}
    return {kind: found[kind] for kind in (*WAYS, PASS) if kind in found}


def _table(layout: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "layout": layout,
            "kind": kind,
            "wall ratio": values["ratio"]["wall_s"],
            "cpu ratio": values["ratio"]["cpu_s"],
            "peak MB": values.get("memory", {}).get("peak"),
            "peak ratio": values.get("memory", {}).get("ratio"),
            "host MB": values.get("memory", {}).get("host"),
        }
        for kind, values in summary.items()
    ]


if __name__ == "__main__":
    main()
