"""`megatron-video dpo rounds`: the whole loop from one YAML file, round after round, with each round's gain.

Every step is a command of its own that goes on where it was interrupted; so does this one. `commands.log` in the folder
holds each command as it could be typed, and what it printed, `report.json` the gains and the seconds of every step,
`side_by_side.png` what each round's model makes of the first prompts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_video.cli import run_command
from megatron_video.config_io import load_config, save_config
from megatron_video.errors import UserError
from megatron_video.files import appearing, write_atomically
from training.alignment.reward_model import CONFIG_FILE as REWARD_FILE
from training.alignment.rounds_config import PRESET_DIR, RoundsConfig
from training.alignment.side_by_side import write_side_by_side
from training.alignment.win_rate import compare
from training.demo_process import run_streamed
from training.sample_prompts import read_prompts, with_seeds

# Exit codes of a training that saved and is to be started again, and of Ctrl-C.
_STOPPED = (130, 143)
# Fields with which rounds that were begun may go on.
_FREE = ("rounds", "workers", "launcher", "sampling_layout")
_TIMES_FILE = "times.jsonl"
_SEEDS_APART = 1_000_000_000


@dataclass(frozen=True)
class Command:
    """One step of a round."""

    step: str
    """Its name in the report."""
    module: str
    """What Python runs."""
    arguments: list[str]
    done: Path
    """There when the step is done."""
    launched: bool = False
    """Whether several ranks work on it."""
    votes: Path | None = None
    """What people are to give before it can start."""


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
            _check_votes(command, number)
            code = _run(command, config.launcher, root, number)
            if code in _STOPPED:
                return code
            if code:
                raise UserError(
                    f"round {number}: {command.module} ended with {code}; what it says stands above, the command in "
                    f"{root / 'commands.log'}; mend it and start the same again"
                )
    report = _report(config, root)
    write_atomically(root / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    folders = {_called(number): root / f"round_{number:02d}" / "evaluation" for number in range(config.rounds + 1)}
    write_side_by_side(folders, root / "side_by_side.png")
    print(json.dumps(report) if arguments.json else _table(report))
    return 0


def steps_of(config: RoundsConfig, root: Path, number: int) -> Iterator[Command]:
    """Commands of a round; of round 0, those that judge the start."""
    folder = root / f"round_{number:02d}"
    if number:
        before = _model(config, root, number - 1)
        yield _generated(config, "generate", before, _round_prompts(config, folder, number), folder / "samples")
        yield from _paired(config, folder)
        yield from _reward_model(config, root, number)
        yield Command(
            "train", "training.dpo", _training(config, folder, number, before), folder / "trained", launched=True
        )
    evaluation = folder / "evaluation"
    yield _generated(config, "evaluate", _model(config, root, number), Path(config.evaluation_prompts), evaluation)
    yield _scored("judge", evaluation, "scores.jsonl", config.score, config.workers)
    for place, judge in enumerate(config.judge):
        yield _scored("judge", evaluation, _judge_file(place), [judge], config.workers)
    if number and config.reward_model is not None:
        # One judge, the newest, of all that is compared in the report.
        model = f"reward:{_reward_folder(root, number)}"
        for other in sorted({0, number - 1, number}):
            yield _scored("judge", root / f"round_{other:02d}" / "evaluation", _reward_judge_file(number), [model])


def _generated(config: RoundsConfig, step: str, model: str, prompts: Path, out: Path) -> Command:
    # With latents always: reward models look at them.
    arguments = ["--checkpoint", model, "--prompts", str(prompts), "--out", str(out), *config.sampling.options()]
    encoders = ["--vae", config.vae, "--text", config.text]
    return Command(
        step,
        "training.alignment.generate",
        [*arguments, *encoders, *config.sampling_layout],
        out / "contact_sheet.png",
        launched=True,
    )


def _paired(config: RoundsConfig, folder: Path) -> Iterator[Command]:
    """By what people said of a round's videos, or by scores."""
    samples, votes, source = folder / "samples", None, []
    if config.people:
        votes = folder / "ratings.jsonl"
        source = ["--ratings", str(votes)]
    else:
        yield _scored("score", samples, "scores.jsonl", config.score, config.workers)
    arguments = ["--samples", str(samples), *source, "--out", str(folder / "pairs"), *config.pairing.options()]
    yield Command("pair", "training.alignment.pair", arguments, folder / "pairs" / "pairs_report.json", votes=votes)


def _reward_model(config: RoundsConfig, root: Path, number: int) -> Iterator[Command]:
    """Train a reward model on the round's pairs, from the round before's if there is one."""
    if config.reward_model is None:
        return
    out = _reward_folder(root, number)
    # The newest first, which the report tells of; old ones, so that they are not forgotten.
    pairs = [str(root / f"round_{made:02d}" / "pairs") for made in range(number, 0, -1)]
    init = ["--init", str(_reward_folder(root, number - 1))] if number > 1 else []
    arguments = ["--pairs", *pairs, "--out", str(out), *init, *config.reward_model.options(number)]
    yield Command("reward", "training.alignment.reward", arguments, out / REWARD_FILE)


def _training(config: RoundsConfig, folder: Path, number: int, before: str) -> list[str]:
    own = {
        "run.output_dir": str(folder / "train"),
        "run.initial_weights": before,
        # Each round draws noise of its own.
        "run.stage": f"dpo_round_{number}",
        "data.shards": json.dumps([str(folder / "pairs")]),
    }
    return ["--config", config.config, *(f"{name}={value}" for name, value in own.items()), *config.train]


def _scored(step: str, folder: Path, file: str, scorers: Sequence[str], workers: int = 1) -> Command:
    chosen = [word for scorer in scorers for word in ("--with", scorer)]
    arguments = ["--samples", str(folder), "--out", str(folder / file), *chosen, "--workers", str(workers)]
    return Command(step, "training.alignment.score", arguments, folder / f"{file}.done")


def _model(config: RoundsConfig, root: Path, number: int) -> str:
    return config.start if number == 0 else str(root / f"round_{number:02d}" / "train")


def _judge_file(place: int) -> str:
    return f"judge_{place}.jsonl"


def _called(number: int) -> str:
    return f"round {number}" if number else "start"


def _reward_folder(root: Path, number: int) -> Path:
    return root / f"round_{number:02d}" / "reward"


def _reward_judge_file(number: int) -> str:
    return f"judge_reward_{number:02d}.jsonl"


def _round_prompts(config: RoundsConfig, folder: Path, number: int) -> Path:
    """The prompts with this round's seeds, as a file of the round."""
    path = folder / "prompts.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts = with_seeds(read_prompts(Path(config.prompts), 0), config.seeds)
        # Prompts that bring no seed get seeds of their own; no round has a seed of another.
        seeds = [prompt.seed + prompt.noise_index * config.seeds for prompt in prompts]
        lines = [
            {**prompt.tags, "prompt": prompt.text, "seed": (number - 1) * _SEEDS_APART + seed}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return path


def _check_votes(command: Command, number: int) -> None:
    if command.votes is not None and not command.votes.exists():
        rate = ["megatron-video", "dpo", "rate", "--samples", str(command.votes.parent / "samples")]
        rate += ["--out", str(command.votes), "--rater", "NAME"]
        raise UserError(
            f"round {number} waits for people's votes in {command.votes}: {shlex.join(rate)}; when all have rated, "
            "start the same again"
        )


def _run(command: Command, launcher: Sequence[str], root: Path, number: int) -> int:
    start = [*launcher, "-m"] if command.launched and launcher else [sys.executable, "-m"]
    words = [*start, command.module, *command.arguments]
    print(f"== {shlex.join(words)}", flush=True)
    begun = time.monotonic()
    code = run_streamed(words, root / "commands.log")
    with (root / _TIMES_FILE).open("a", encoding="utf-8") as lines:
        seconds = round(time.monotonic() - begun, 1)
        lines.write(json.dumps({"round": number, "step": command.step, "seconds": seconds, "exit_code": code}) + "\n")
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
        names = [name for name in vars(config) if name not in _FREE]
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
    rounds = []
    for number in range(1, config.rounds + 1):
        here, before, start = (root / f"round_{n:02d}" / "evaluation" for n in (number, number - 1, 0))
        files = _judges(config, number)
        gains = {
            name: {
                "over_the_round_before": compare(before, here, file).values(),
                "over_the_start": compare(start, here, file).values(),
            }
            for name, file in files.items()
        }
        pairs = json.loads((root / f"round_{number:02d}" / "pairs" / "pairs_report.json").read_text(encoding="utf-8"))
        rounds.append(
            {
                "round": number,
                "pairs": pairs["pairs"],
                "mean_margin": pairs["margin"]["mean"],
                "gains": gains,
                **_reward_quality(config, root, number),
                "seconds": _seconds(root, number),
            }
        )
    return {"output_dir": str(root), "seconds_of_the_start": _seconds(root, 0), "rounds": rounds}


def _judges(config: RoundsConfig, number: int) -> dict[str, str]:
    """Files of scores in an evaluation of a round, by what they are called."""
    files = {"+".join(config.score): "scores.jsonl"}
    files |= {judge: _judge_file(place) for place, judge in enumerate(config.judge)}
    return files | ({"reward model": _reward_judge_file(number)} if config.reward_model is not None else {})


def _reward_quality(config: RoundsConfig, root: Path, number: int) -> dict[str, Any]:
    """How the reward model judges held-out pairs of the round, before and after it was tuned on the others."""
    if config.reward_model is None:
        return {}
    trained = json.loads((_reward_folder(root, number) / REWARD_FILE).read_text(encoding="utf-8"))["trained"]
    return {"reward_model": {name: trained["folders"][0][name] for name in ("before", "held_out")}}


def _seconds(root: Path, number: int) -> dict[str, float]:
    """Wall time of the steps of a round, over all starts."""
    total: Counter[str] = Counter()
    for line in (root / _TIMES_FILE).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values["round"] == number:
            total[values["step"]] += values["seconds"]
    return {step: round(seconds, 1) for step, seconds in total.items()}


def _table(report: dict[str, Any]) -> str:
    lines = ["round  pairs  judged by             win rate over the round before   over the start      mean score"]
    for item in report["rounds"]:
        for name, gains in item["gains"].items():
            before, start = gains["over_the_round_before"], gains["over_the_start"]
            lines.append(
                f"{item['round']:>5}  {item['pairs']:>5}  {name:<20}  {before['win_rate']:>10.1%}{'':<20}"
                f"{start['win_rate']:>10.1%}{'':<8}{start['mean_before']:.4g} -> {start['mean_after']:.4g}"
            )
        if "reward_model" in item:
            before, after = item["reward_model"]["before"], item["reward_model"]["held_out"]
            lines.append(
                f"       the reward model is right on {before['accuracy']:.1%} of {before['pairs']} held-out pairs of "
                f"the round, {after['accuracy']:.1%} once tuned"
            )
        lines.append(f"       {sum(item['seconds'].values()):.0f} s")
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo rounds", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file; its fields: training/alignment/rounds_config.py")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. rounds=3")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
