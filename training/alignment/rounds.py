"""`megatron-video dpo rounds`: the whole loop from one YAML file, round after round, with each round's gain.

Every step is a command of its own that goes on where it was interrupted; so does this one. `commands.log` in the folder
holds each command as it could be typed, and what it printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_video.cli import run_command
from megatron_video.config_io import load_config, save_config
from megatron_video.errors import UserError
from megatron_video.files import appearing, write_atomically
from training.alignment.rounds_config import PRESET_DIR, RoundsConfig
from training.alignment.win_rate import compare
from training.demo_process import run_streamed
from training.sample_prompts import read_prompts, with_seeds

# Exit codes of a training that saved and is to be started again, and of Ctrl-C.
_STOPPED = (130, 143)


@dataclass(frozen=True)
class Command:
    """One step of a round."""

    module: str
    """What Python runs."""
    arguments: list[str]
    done: Path
    """There when the step is done."""
    launched: bool = False
    """Whether several ranks work on it."""


def main(argv: Sequence[str]) -> int:
    """Run what is left of the rounds, and report.

    Raises:
        UserError: a configuration that cannot work, another one than the folder was begun with, or a step that failed.
    """
    arguments = _parse(argv)
    config = load_config(RoundsConfig, arguments.config, arguments.overrides, PRESET_DIR)
    root = Path(config.output_dir)
    _claim(config, root)
    for number in range(config.rounds + 1):
        for command in steps_of(config, root, number):
            if command.done.exists():
                continue
            code = _run(command, config.launcher, root)
            if code in _STOPPED:
                return code
            if code:
                raise UserError(
                    f"round {number}: {command.module} ended with {code}; what it says stands above, the command in "
                    f"{root / 'commands.log'}; mend it and start the same again"
                )
    report = _report(config, root)
    write_atomically(root / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report) if arguments.json else _table(report))
    return 0


def steps_of(config: RoundsConfig, root: Path, number: int) -> Iterator[Command]:
    """Commands of a round; of round 0, those that judge the start."""
    folder, model = root / f"round_{number:02d}", _model(config, root, number)
    sampling = [*config.sampling.options(), "--vae", config.vae, "--text", config.text]
    if number:
        samples, pairs = folder / "samples", folder / "pairs"
        before = _model(config, root, number - 1)
        prompts = _round_prompts(config, folder, number)
        source = ["--checkpoint", before, "--prompts", str(prompts), "--out", str(samples)]
        yield Command("training.alignment.generate", [*source, *sampling], samples / "contact_sheet.png", launched=True)
        yield _scored(samples, "scores.jsonl", config.score)
        out = ["--samples", str(samples), "--out", str(pairs)]
        yield Command("training.alignment.pair", [*out, *config.pairing.options()], pairs / "pairs_report.json")
        yield Command("training.dpo", _training(config, folder, number, before), folder / "trained", launched=True)
    evaluation = folder / "evaluation"
    source = ["--checkpoint", model, "--prompts", config.evaluation_prompts, "--out", str(evaluation)]
    # With latents, which reward models look at.
    yield Command("training.alignment.generate", [*source, *sampling], evaluation / "contact_sheet.png", launched=True)
    yield _scored(evaluation, "scores.jsonl", config.score)
    for place, judge in enumerate(config.judge):
        yield _scored(evaluation, _judge_file(place), [judge])


def _training(config: RoundsConfig, folder: Path, number: int, before: str) -> list[str]:
    own = {
        "run.output_dir": str(folder / "train"),
        "run.initial_weights": before,
        # Each round draws noise of its own.
        "run.stage": f"dpo_round_{number}",
        "data.shards": json.dumps([str(folder / "pairs")]),
    }
    return ["--config", config.config, *(f"{name}={value}" for name, value in own.items()), *config.train]


def _scored(folder: Path, file: str, scorers: Sequence[str]) -> Command:
    chosen = [word for scorer in scorers for word in ("--with", scorer)]
    arguments = ["--samples", str(folder), "--out", str(folder / file), *chosen]
    return Command("training.alignment.score", arguments, folder / f"{file}.done")


def _model(config: RoundsConfig, root: Path, number: int) -> str:
    return config.start if number == 0 else str(root / f"round_{number:02d}" / "train")


def _judge_file(place: int) -> str:
    return f"judge_{place}.jsonl"


def _round_prompts(config: RoundsConfig, folder: Path, number: int) -> Path:
    """The prompts with this round's seeds, as a file of the round."""
    path = folder / "prompts.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts = with_seeds(read_prompts(Path(config.prompts), 0), config.seeds)
        # Rounds a million apart: no seed comes twice, whatever the file gives.
        lines = [{"prompt": prompt.text, "seed": (number - 1) * 1_000_000 + prompt.seed} for prompt in prompts]
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return path


def _run(command: Command, launcher: Sequence[str], root: Path) -> int:
    start = [*launcher, "-m"] if command.launched and launcher else [sys.executable, "-m"]
    words = [*start, command.module, *command.arguments]
    print(f"== {shlex.join(words)}", flush=True)
    code = run_streamed(words, root / "commands.log")
    # Samples and pairs have a file that comes last; trainings and scores get a mark.
    if code == 0 and not command.done.exists():
        write_atomically(command.done, b"")
    return code


def _claim(config: RoundsConfig, root: Path) -> None:
    """Keep the configuration with the rounds.

    Raises:
        UserError: the folder was begun with another one; more rounds may be asked for.
    """
    for name in ("prompts", "evaluation_prompts"):
        read_prompts(Path(getattr(config, name)), 0)
    path = root / "rounds.yaml"
    if path.exists():
        before = load_config(RoundsConfig, path)
        names = [name for name in vars(config) if name not in ("rounds", "launcher")]
        different = [name for name in names if getattr(before, name) != getattr(config, name)]
        if different:
            lines = "; ".join(
                f"{name}: {getattr(before, name)} there, {getattr(config, name)} here" for name in different
            )
            raise UserError(f"output_dir={root} was begun with other values ({lines}); choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        save_config(config, temporary)


def _report(config: RoundsConfig, root: Path) -> dict[str, Any]:
    """Gain of every round over the one before and over the start, by what trained and by each judge."""
    files = {"+".join(config.score): "scores.jsonl"}
    files |= {judge: _judge_file(place) for place, judge in enumerate(config.judge)}
    rounds = []
    for number in range(1, config.rounds + 1):
        here, before, start = (root / f"round_{n:02d}" / "evaluation" for n in (number, number - 1, 0))
        gains = {
            name: {
                "over_the_round_before": compare(before, here, file).values(),
                "over_the_start": compare(start, here, file).values(),
            }
            for name, file in files.items()
        }
        pairs = json.loads((root / f"round_{number:02d}" / "pairs" / "pairs_report.json").read_text(encoding="utf-8"))
        rounds.append(
            {"round": number, "pairs": pairs["pairs"], "mean_margin": pairs["margin"]["mean"], "gains": gains}
        )
    return {"output_dir": str(root), "rounds": rounds}


def _table(report: dict[str, Any]) -> str:
    lines = ["round  pairs  judged by             win rate over the round before   over the start      mean score"]
    for item in report["rounds"]:
        for name, gains in item["gains"].items():
            before, start = gains["over_the_round_before"], gains["over_the_start"]
            lines.append(
                f"{item['round']:>5}  {item['pairs']:>5}  {name:<20}  {before['win_rate']:>10.1%}{'':<20}"
                f"{start['win_rate']:>10.1%}{'':<8}{start['mean_before']:.4g} -> {start['mean_after']:.4g}"
            )
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo rounds", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file; its fields: training/alignment/rounds_config.py")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. rounds=3")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
