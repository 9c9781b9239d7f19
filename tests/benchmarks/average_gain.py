"""Does `megatron-video ckpt average` improve a noisy run? Validation losses of checkpoints, of their means and EMAs.

A small DiT trains with a high constant learning rate, so that its weights wander about a minimum. It keeps an EMA of
its own, the truth for the reconstructed ones. Losses are those of `validation` in a run: held-out samples at fixed
times with fixed noise. Several seeds; nothing is chosen by its loss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
import yaml
from average_gain_page import write_page
from children import python, run_child
from tiny_shards import write_tiny_shards  # its folder is on the path by report

from checkpoints_tools.average import Options, Source, average
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.derived import Output
from checkpoints_tools.reconstruct import WantedAverage
from checkpoints_tools.weights import Weights
from data_prep.cli import main as data_command
from megatron_video.config_io import load_config
from megatron_video.dit import build_dit
from megatron_video.noise import NoiseSource
from megatron_video.parallel import one_process
from training.checkpoint import load_model_weights, step_folder
from training.checkups import open_validation
from training.config import AdamWConfig, PretrainConfig
from training.data import BatchBuilder
from training.data_set import TrainingData
from training.optimizer import build_optimizer, wrap_data_parallel
from training.validation import Validation

KEPT, KEPT_DECAY = "EMA kept by the run", 0.98
MEANS = (2, 4, 8, 16)
DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995)
POST_HOC = (0.95, 0.99)
DENSITIES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Run:
    """One trained run."""

    config: PretrainConfig
    every: int

    def folder(self, step: int) -> Path:
        """Of the checkpoint after a step."""
        return step_folder(Path(self.config.run.output_dir), step)

    @property
    def steps(self) -> list[int]:
        """With a checkpoint."""
        return list(range(0, self.config.training.steps + 1, self.every))

    def last(self, count: int) -> list[Source]:
        """The newest checkpoints."""
        return [Source(self.folder(step)) for step in self.steps[-count:]]


class Judge:
    """Says the validation loss of weights on the disk."""

    def __init__(self, config: PretrainConfig, chunks: Sequence[Any], model: list[Any], validation: Validation) -> None:
        self._chunks, self._model, self._validation = chunks, model, validation

    def loss(self, folder: Path, averaged: bool = False) -> float:
        """Of a checkpoint's weights, or of the averages that the run kept."""
        load_model_weights(folder, list(self._chunks), averaged=averaged)
        return self._validation.run(self._model).loss


@contextmanager
def judge(config: PretrainConfig) -> Iterator[Judge]:
    """What validates as a run of this configuration does."""
    data = TrainingData.open(config.data)
    with one_process() as parallel:
        chunks = build_dit(config.model, parallel, torch.float32, device=torch.device("cpu"))
        model = wrap_data_parallel(chunks, parallel)
        build_optimizer(model, AdamWConfig(), parallel)
        noise = NoiseSource(config.run.seed, config.run.stage)
        builder = BatchBuilder(data, noise, config.flow, 0.0, torch.float32, config.model)
        yield Judge(config, chunks, model, open_validation(config, data, builder))


@dataclass(frozen=True)
class ShardPair:
    """Encoded samples."""

    train: Path
    held_out: Path
    channels: int
    """Of the latents."""
    caption_widths: list[int]
    """Of Step-LLM and CLIP states."""


def make_shards(shards: Path | None, work: Path) -> ShardPair:
    """Split the given shards, or make some up."""
    train, held_out = work / "train", work / "held_out"
    if shards is None:
        counts = {"17x48x48": 40, "1x48x48": 40}
        write_tiny_shards(train, counts, learnable=True, source="train")
        write_tiny_shards(held_out, counts, seed=1, learnable=True, source="held_out")
    else:
        parts = ["--in", str(shards), "--out", str(work), "--parts", "train=75,held_out=25"]
        assert data_command(["split", *parts]) == 0
    info = json.loads((train / "dataset_info.json").read_text(encoding="utf-8"))
    return ShardPair(train, held_out, info["latent_channels"], [info["llm_dim"], info["clip_dim"]])


def configuration(arguments: argparse.Namespace, data: ShardPair, work: Path, seed: int) -> dict[str, Any]:
    """Plain values of the run's configuration."""
    return {
        "run": {"output_dir": str(work / f"seed{seed}"), "seed": seed, "stage": "average_gain"},
        "model": {
            "num_layers": arguments.layers,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": data.channels,
            "out_channels": data.channels,
            "caption_channels": data.caption_widths,
        },
        "data": {"shards": [str(data.train)], "micro_batch_size": 8, "global_batch_size": 8, "text_dropout": 0.1},
        "optimizer": {"learning_rate": arguments.learning_rate, "warmup_steps": 20, "decay": "constant"},
        "ema": {"decay": KEPT_DECAY},
        "validation": {"every": arguments.steps, "shards": [str(data.held_out)], "micro_batch_size": 16},
        "training": {
            "steps": arguments.steps,
            "precision": "fp32",
            "save_every": arguments.every,
            "save_initial": True,
            "keep_checkpoints": 0,
            "log_every": 100,
        },
    }


def train(values: Mapping[str, Any], path: Path, every: int) -> Run:
    """Run pretraining in a process of its own."""
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    run_child(python("-m", "training.pretrain", "--config", str(path)))
    return Run(load_config(PretrainConfig, path), every)


def losses(run: Run, work: Path) -> list[dict[str, Any]]:
    """Validation losses: kind, what, value."""
    singles = run.steps[len(run.steps) // 2 :]
    rows: list[dict[str, Any]] = [{"kind": "checkpoint", "what": step, "folder": run.folder(step)} for step in singles]
    rows.append({"kind": KEPT, "what": KEPT_DECAY, "folder": run.folder(singles[-1])})
    # All before the model is built: reading a checkpoint's sizes needs the process groups too.
    for number, (kind, what, sources, options) in enumerate(averages(run)):
        folder = work / f"mixed{number}"
        average(sources, Output(folder), options)
        rows.append({"kind": kind, "what": what, "folder": folder})
    with judge(run.config) as judged:
        for row in rows:
            row["loss"] = judged.loss(row.pop("folder"), averaged=row["kind"] == KEPT)
    for folder in work.glob("mixed*"):
        shutil.rmtree(folder)
    return rows


def averages(run: Run) -> Iterator[tuple[str, float, list[Source], Options]]:
    """All that is asked of `average`."""
    count = len(run.steps)
    for number in MEANS:
        if number <= count // 2:
            yield "mean of last n", number, run.last(number), Options()
    for decay in DECAYS:
        yield "EMA from weights", decay, run.last(count), Options(wanted=WantedAverage(decay))
    for decay in POST_HOC:
        wanted = WantedAverage(decay, tolerance=1.0)
        yield "EMA from stored EMAs", decay, run.last(count), Options(ema=True, wanted=wanted)


def distances(run: Run, work: Path) -> list[dict[str, Any]]:
    """How far reconstructions of the kept EMA are from it, over how far the last weights are, by density."""
    last = run.folder(run.steps[-1])
    truth, trained = CoreCheckpoint(last, averaged=True), CoreCheckpoint(last)
    scale = _distance(trained, truth)
    rows = []
    for density in DENSITIES:
        steps = run.steps[::-density]
        if len(steps) < 2:
            continue
        shutil.rmtree(work / "mixed", ignore_errors=True)
        sources = [Source(run.folder(step)) for step in steps]
        average(sources, Output(work / "mixed"), Options(wanted=WantedAverage(KEPT_DECAY, tolerance=1.0)))
        error = _distance(CoreCheckpoint(work / "mixed"), truth) / scale
        rows.append({"kind": "distance to the kept EMA", "what": density * run.every, "error": error})
    return rows


def _distance(first: Weights, second: Weights) -> float:
    squares = [(first.tensor(name) - second.tensor(name)).double().square().sum() for name in first.templates]
    return float(torch.stack(squares).sum().sqrt())


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds: mean loss of every way, and its gain over the median and over the last checkpoint of its run."""
    ways = dict.fromkeys((row["kind"], row["what"]) for row in rows if "loss" in row and row["kind"] != "checkpoint")
    singles = {
        seed: [row["loss"] for row in rows if row["seed"] == seed and row["kind"] == "checkpoint"]
        for seed in dict.fromkeys(row["seed"] for row in rows)
    }
    table = []
    for kind, what in ways:
        found = {row["seed"]: row["loss"] for row in rows if (row["kind"], row["what"]) == (kind, what)}
        gains = {
            name: [1 - loss / of(singles[seed]) for seed, loss in found.items()]
            for name, of in (("median", statistics.median), ("best", min), ("last", lambda losses: losses[-1]))
        }
        table.append(
            {
                "way": kind,
                "of": what,
                "loss": statistics.mean(found.values()),
                **{f"gain_{name}_pct": 100 * statistics.mean(values) for name, values in gains.items()},
                "worst_gain_last_pct": 100 * min(gains["last"]),
            }
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Train, average, validate, write results, page and plot."""
    arguments = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="average_gain") as folder:
        rows = measure(arguments, Path(folder))
    table = summarise(rows)
    report.print_table(table, list(table[0]))
    settings = {name: str(value) for name, value in vars(arguments).items()}
    report.write(arguments.out, settings, rows, {"table": table})
    if arguments.page is not None:
        write_page(arguments.page, settings, rows, table)


def measure(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Losses and distances of all seeds."""
    rows: list[dict[str, Any]] = []
    data = make_shards(arguments.shards, work)
    for seed in range(arguments.seeds):
        values = configuration(arguments, data, work, seed)
        run = train(values, work / f"seed{seed}.yaml", arguments.every)
        rows += [{"seed": seed, **row} for row in [*losses(run, work), *distances(run, work)]]
        shutil.rmtree(run.config.run.output_dir)
    return rows


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, help="encoded shards, such as runs/demo/shards; made up unless given")
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--every", type=int, default=16, help="steps between checkpoints (default 16)")
    parser.add_argument("--seeds", type=int, default=3, help="runs (default 3)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "average_gain.json")
    parser.add_argument("--page", type=Path, help="Markdown page to write, with a plot beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
