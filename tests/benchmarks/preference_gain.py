"""What preference training does to the demo's model: rounds of the loop, and what wrong labels, a wrong beta or another
objective make of the first round's pairs.

Needs `make demo`. Every training starts from the demo's model and is judged on captions and noise that no pair has
seen. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from children import python, run_child
from preference_gain_page import write_page
from tqdm import tqdm

from megatron_video.config_io import load_config
from training.alignment.rounds_config import PRESET_DIR, RoundsConfig
from training.alignment.scorers import SCORERS
from training.alignment.win_rate import compare
from training.measure_shapes import measure, samples_of, summarise
from training.sample_prompts import read_prompts

JUDGE = "judge_reward_01.jsonl"
# How many of the last steps a training's figures are means of.
LAST = 10


@dataclass(frozen=True)
class Variant:
    """One more training, on the first round's pairs."""

    name: str
    overrides: tuple[str, ...] = ()
    flipped: bool = False
    """With 30 % of the labels wrong."""


VARIANTS = (
    Variant("another seed", ("run.seed=1",)),
    Variant("a third seed", ("run.seed=2",)),
    Variant("beta 500", ("dpo.beta=500",)),
    Variant("beta 20", ("dpo.beta=20",)),
    Variant("IPO, beta 50", ("dpo.loss=ipo", "dpo.beta=50")),
    Variant("with the winners' own error (sft_weight 1)", ("dpo.sft_weight=1.0",)),
    Variant("beta 100 to 400", ("dpo.final_beta=400",)),
    Variant("30 % of the labels flipped", flipped=True),
    Variant("30 % flipped, label_smoothing 0.3", ("dpo.label_smoothing=0.3",), flipped=True),
    Variant("30 % flipped, rdpo", ("dpo.loss=rdpo", "dpo.label_smoothing=0.3"), flipped=True),
    Variant("30 % flipped, half the steps", ("training.steps=40",), flipped=True),
    Variant("beta 100,000, learning rate 5e-4", ("dpo.beta=100000", "optimizer.learning_rate=5e-4")),
)


@dataclass(frozen=True)
class Bench:
    """Where everything is."""

    config: RoundsConfig
    launcher: list[str]

    @property
    def root(self) -> Path:
        """Of the rounds."""
        return Path(self.config.output_dir)

    @property
    def first(self) -> Path:
        """Round 1, whose pairs all variants are trained on."""
        return self.root / "round_01"

    def start(self) -> Path:
        """Evaluation of the demo's model."""
        return self.root / "round_00" / "evaluation"

    def launched(self, module: str, *arguments: str) -> None:
        """Run a step on the ranks of the configuration."""
        command = [*self.launcher, "-m", module] if self.launcher else python("-m", module)
        run_child([*command, *arguments])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print and write."""
    arguments = _parse(argv)
    overrides = list(arguments.overrides)
    # Not as the others: it takes long, and says how far it is.
    subprocess.run(python("-m", "training.alignment.rounds", "--config", arguments.config, *overrides), check=True)
    config = load_config(RoundsConfig, arguments.config, overrides, PRESET_DIR)
    bench = Bench(config, config.launcher)
    # Folders by the place in the list of all: a later call may take others.
    chosen = [(n, item) for n, item in enumerate(VARIANTS) if arguments.only is None or item.name in arguments.only]
    if any(variant.flipped for _, variant in chosen):
        make_flipped_pairs(bench)
    rows = [outcome(bench, "the demo's model", bench.start(), None)]
    for number in range(1, config.rounds + 1):
        folder = bench.root / f"round_{number:02d}"
        rows.append(outcome(bench, f"round {number}", folder / "evaluation", folder / "train"))
    for number, variant in tqdm(chosen, desc="variants", disable=None):
        folder = bench.root / "variants" / f"{number:02d}"
        train(bench, variant, folder)
        rows.append(outcome(bench, variant.name, folder / "evaluation", folder / "train"))
    rounds = json.loads((bench.root / "report.json").read_text(encoding="utf-8"))
    report.print_table(
        rows, ["training", "win_rate", "win_rate_by_reward_model", "colour", "direction", "loss", "margin"]
    )
    settings = {
        "config": arguments.config,
        "overrides": overrides,
        "score": {name: (SCORERS[name].__doc__ or "").partition("\n")[0] for name in config.score},
        "prompts": len(read_prompts(Path(config.prompts), 0)),
        "seeds": config.seeds,
    }
    report.write(arguments.out, settings, rows, rounds)
    shutil.copyfile(bench.root / "side_by_side.png", arguments.page.with_suffix(".png"))
    write_page(arguments.page, json.loads(arguments.out.read_text(encoding="utf-8")))


def make_flipped_pairs(bench: Bench) -> None:
    """The first round's pairs, 30 % of them the wrong way round."""
    out = bench.root / "flipped_pairs"
    if not (out / "pairs_report.json").exists():
        source = ["--samples", str(bench.first / "samples"), "--out", str(out)]
        options = [*bench.config.pairing.options(), "--flip-labels", "0.3"]
        run_child(python("-m", "training.alignment.pair", *source, *options))


def train(bench: Bench, variant: Variant, folder: Path) -> None:
    """Train a variant and make and score its evaluation; all steps go on where they stopped."""
    config, pairs = bench.config, bench.root / "flipped_pairs" if variant.flipped else bench.first / "pairs"
    own = {"run.output_dir": folder / "train", "run.initial_weights": config.start, "run.stage": "dpo_round_1"}
    values = [f"{name}={value}" for name, value in own.items()]
    shards = f"data.shards={json.dumps([str(pairs)])}"
    bench.launched("training.dpo", "--config", config.config, *values, shards, *config.train, *variant.overrides)
    evaluation = folder / "evaluation"
    source = ["--checkpoint", str(folder / "train"), "--prompts", config.evaluation_prompts, "--out", str(evaluation)]
    encoders = ["--vae", config.vae, "--text", config.text]
    bench.launched("training.alignment.generate", *source, *encoders, *config.sampling.options())
    judges = {"scores.jsonl": config.score, JUDGE: [f"reward:{bench.first / 'reward'}"]}
    for file, scorers in judges.items():
        chosen = [word for scorer in scorers for word in ("--with", scorer)]
        out = ["--samples", str(evaluation), "--out", str(evaluation / file)]
        run_child(python("-m", "training.alignment.score", *out, *chosen))


def outcome(bench: Bench, name: str, evaluation: Path, run: Path | None) -> dict[str, Any]:
    """Figures of one model; win rates are against the demo's model with the same captions and noise."""
    shown = summarise([measure(clip) for clip in samples_of(evaluation)], str(evaluation))
    row: dict[str, Any] = {
        "training": name,
        "videos": shown["videos"],
        **{asked: shown[asked]["accuracy"] for asked in ("colour", "direction", "both")},
    }
    if run is None:
        return row
    by_reward = compare(bench.start(), evaluation).values()
    # Later rounds have newer reward models; one judge for all rows is the first.
    if (evaluation / JUDGE).exists():
        row["win_rate_by_reward_model"] = compare(bench.start(), evaluation, JUDGE).values()["win_rate"]
    row |= {name: by_reward[name] for name in ("win_rate", "interval_95", "mean_before", "mean_after")}
    return row | _training_figures(run)


def _training_figures(run: Path) -> dict[str, Any]:
    """Means over the last steps of a run."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-LAST:]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    preference = {name: mean([step["preference"][name] for step in steps]) for name in steps[0]["preference"]}
    return {
        "loss": mean([step["loss"] for step in steps]),
        "margin": preference["reward_margin"],
        "accuracy": preference["reward_accuracy"],
        "winner_change": preference["winner_change"],
        "loser_change": preference["loser_change"],
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config", default="demo", help="of `megatron-video dpo rounds` (default: %(default)s)")
    add("--only", nargs="*", help="these variants (default: all)")
    add("--out", type=Path, default=report.RESULTS / "preference_gain.json", help="results file")
    add("--page", type=Path, default=Path("docs/alignment/gain.md"), help="the page (default: %(default)s)")
    add("overrides", nargs="*", metavar="field=value", help="of the configuration, e.g. rounds=3")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
