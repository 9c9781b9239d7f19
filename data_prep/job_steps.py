"""What a batch system has to know of a stage, or of a recipe's stages, as JSON: `python -m data_prep.job_steps ...`.

    python -m data_prep.job_steps STAGE --in ... --out ...      arguments of `megatron-video data STAGE`
    python -m data_prep.job_steps --recipe YAML [--in ...] [--work ...]

Everything is asked of the stages' own parsers, which also refuse wrong options here, before anything is submitted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.cli import STAGES
from data_prep.parts import lock_path
from data_prep.recipe import Run, plan
from data_prep.shard_folder import LOCK_FILE
from data_prep.stage import StageParser, checked_parser
from megatron_video.cli import run_command
from megatron_video.errors import UserError

# Commands whose work does not go from --in to --out by a parser of `stage_parser`'s kind.
_NO_JOBS = ("make-demo-clips", "blend", "run")
# Options that take a number of CPUs, the first that a stage has; encode's --workers are its GPUs.
_CPU_OPTIONS = {"encode": "--decode-threads"}


@dataclass(frozen=True)
class JobStep:
    """One stage as jobs see it."""

    name: str
    """Of the stage, in recipes with its number in front."""
    stage: str
    command: list[str]
    """Words behind `megatron-video`."""
    output: str | None
    """What it makes; None for a stage that only reads."""
    shard_folder: bool
    """It makes a folder of shards."""
    lock: str | None
    """The file by which runs on one output keep each other out; that of a share I of N has .I-of-N behind it."""
    spread: bool
    """Takes --shard I/N."""
    gpu: bool
    """Is faster with a GPU, with these options."""
    cpu_option: str | None
    """Option that tells it how many CPUs it has; None if there is none, or it is given already."""


def main(argv: Sequence[str]) -> int:
    """Print a JSON list of steps."""
    arguments = list(argv)
    if not arguments or arguments[0].startswith("-"):
        steps = recipe_steps(arguments)
    else:
        steps = [stage_step(arguments[0], arguments[1:])]
    print(json.dumps([asdict(step) for step in steps]))
    return 0


def stage_step(stage: str, argv: Sequence[str], name: str | None = None) -> JobStep:
    """Look at one stage with its arguments.

    Raises:
        UserError: no such stage, or what its parser and its checks refuse.
    """
    names = [known for known in STAGES if known not in _NO_JOBS]
    if stage not in names:
        raise UserError(f"unknown stage {stage!r} of `megatron-video data`; those that can be jobs: {', '.join(names)}")
    stage_main = importlib.import_module(STAGES[stage][0]).main
    parser = checked_parser(stage_main, argv)
    values = argparse.ArgumentParser.parse_args(parser, argv)
    if getattr(values, "shard", None):
        raise UserError(f"--shard {values.shard}: the shards are the tasks of the job; say how many with --shards")
    known = {option for action in parser._actions for option in action.option_strings}
    option = _CPU_OPTIONS.get(stage, "--workers")
    output: Path | None = getattr(values, "out", None)
    made = next((action.metavar for action in parser._actions if "--out" in action.option_strings), None)
    return JobStep(
        name=name or stage,
        stage=stage,
        command=["data", stage, *argv],
        output=None if output is None else str(output),
        shard_folder=made == "SHARD_FOLDER",
        lock=None if output is None else str(lock_path(output) if made == "MANIFEST" else output / LOCK_FILE),
        spread="--shard" in known,
        gpu=_wants_gpu(parser, values, argv),
        cpu_option=option if option in known and not _given(option, argv) else None,
    )


def recipe_steps(argv: Sequence[str]) -> list[JobStep]:
    """Look at all stages of a recipe.

    Raises:
        UserError: what the recipe or a stage refuses.
    """
    parser = argparse.ArgumentParser(prog="megatron-video slurm submit data run")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--in", dest="source", type=Path)
    parser.add_argument("--work", type=Path)
    values = parser.parse_args(argv)
    _, steps = plan(values.recipe, Run(values.source, values.work))
    return [
        stage_step(
            step.stage, [f"--in={step.source}", *([f"--out={step.out}"] if step.out else []), *step.argv], step.name
        )
        for step in steps
    ]


def _wants_gpu(parser: argparse.ArgumentParser, values: argparse.Namespace, argv: Sequence[str]) -> bool:
    if not isinstance(parser, StageParser) or parser.gpu is None or not parser.gpu(values):
        return False
    # Where no device is named, the default tells of the machine that asks, not of the one that will work.
    return not (_given("--device", argv) and values.device == "cpu")


def _given(option: str, argv: Sequence[str]) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
