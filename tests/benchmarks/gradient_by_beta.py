"""How large the gradient of the preference loss is, by beta, and how many steps clipping shortens; a page of it.

Each beta trains the same tiny model from the same start on the same pairs; the norm is that of all gradients before
clipping, as `metrics.jsonl` has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from tiny_pairs import write_tiny_pairs
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards

from megatron_video.config_io import load_config
from training.config import PretrainConfig
from training.local_ranks import RankPool
from training.planner.tables import Table, number
from training.pretrain import run_training

PAGE = Path(__file__).parents[2] / "docs" / "alignment" / "gradient_by_beta.md"
CLIP = 1.0
FORMATS = {
    "beta": number(0),
    "first": number(3),
    "first / beta": number(5),
    "median": number(3),
    "clipped %": number(0),
    "loss": number(3),
    "accuracy": number(2),
}
HEADS = {
    "first": "gradient norm, step 1",
    "first / beta": "the same / beta",
    "median": "median of all steps",
    "clipped %": f"steps above {CLIP:g}, %",
    "loss": "loss, last quarter",
    "accuracy": "reward accuracy, last quarter",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every beta, print the table, write results and page."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, RankPool(1, "cpu") as pool:
        folder = Path(name)
        write_tiny_shards(folder / "samples", learnable=True)
        write_tiny_pairs(folder / "pairs", {"17x48x48": 32})
        pool.run(
            run_training, _config(["run.output_dir=base", "data.shards=[samples]", "training.steps=100"], folder), True
        )
        rows = [_row(pool, folder, beta, options) for beta in options.betas]
    table = Table(f"{options.steps} steps of 8 pairs, learning rate {options.learning_rate:g}", rows, FORMATS, HEADS)
    print(table.text())
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "page")}
    report.write(options.out, settings, rows, {})
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(_page(table), encoding="utf-8")
    print(f"written to {options.out} and {options.page}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--betas", type=float, nargs="+", default=[1, 4, 5, 10, 100, 500, 5000])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "gradient_by_beta.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser


def _config(overrides: Sequence[str], folder: Path) -> PretrainConfig:
    common = ["training.precision=fp32", "data.micro_batch_size=8", "data.global_batch_size=8", "data.text_dropout=0.0"]
    common += ["optimizer.warmup_steps=0", f"optimizer.clip_grad_norm={CLIP}", "optimizer.decay=constant"]
    placed = [
        override.replace("output_dir=", f"output_dir={folder}/").replace("shards=[", f"shards=[{folder}/")
        for override in overrides
    ]
    return load_config(PretrainConfig, None, [*MODEL_OVERRIDES, *common, *placed])


def _row(pool: RankPool, folder: Path, beta: float, options: argparse.Namespace) -> dict[str, Any]:
    own = [f"dpo.beta={beta}", "run.stage=dpo", f"run.initial_weights={folder / 'base'}", f"run.output_dir=beta_{beta}"]
    own += [f"optimizer.learning_rate={options.learning_rate}", f"training.steps={options.steps}"]
    config = _config([*own, "data.shards=[pairs]"], folder)
    pool.run(run_training, config, True)
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    norms = [step["grad_norm"] for step in steps]
    last = steps[-max(1, len(steps) // 4) :]
    return {
        "beta": beta,
        "first": norms[0],
        "first / beta": norms[0] / beta,
        "median": statistics.median(norms),
        "clipped %": 100 * sum(norm > CLIP for norm in norms) / len(norms),
        "loss": statistics.mean(step["loss"] for step in last),
        "accuracy": statistics.mean(step["preference"]["reward_accuracy"] for step in last),
    }


def _page(table: Table) -> str:
    return f"""# The gradient of the preference loss, by beta

Written by `python tests/benchmarks/gradient_by_beta.py`, on a CPU, with a tiny model: how the columns depend on beta is
what counts here, and not their size.

{table.markdown()}

At step 1 policy and reference are one, every margin is 0, and the norm is proportional to beta
(docs/preference_alignment.md derives it).
"""


if __name__ == "__main__":
    main()
