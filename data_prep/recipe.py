"""A recipe: the stages of a whole pipeline with their options, in YAML, run one after the other.

    source: raw                     # or --in; folder, listing or tar
    work: work                      # or --work; one file or folder a stage, WORK/<n>-<stage>
    stages:
      - ingest:
      - segment: {min_frames: 17}   # as `megatron-video data segment --min-frames 17`
      - tag:

All that a recipe knows about a stage is its command line, so a stage joins by being in the table of data_prep/cli.py
and having --in and --json (and --out if it makes something). Everything is checked before the first stage runs. Paths
in a recipe are relative to it; `{work}` stands for the work folder.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.cli import STAGES
from data_prep.run_report import StageRun, read_runs, write_run_report
from data_prep.stage import checked_parser
from megatron_video.config_io import config_dataclass, load_config
from megatron_video.errors import BAD_INPUT_EXIT_CODE, UserError
from megatron_video.run_lock import run_lock

# Commands of the table that are no step from a manifest to the next.
_NO_STAGES = ("make-demo-clips", "blend", "run")
# What they write is looked at; the stage behind them reads what they read.
_ONLY_LOOK = ("inspect",)
Options = dict[str, Any]


@config_dataclass
class Recipe:
    """A whole pipeline."""

    source: str | None = None
    """What the first stage reads; --in goes before it."""
    work: str | None = None
    """Folder for what the stages make; --work goes before it."""
    stages: list[Any]
    """Name of a stage, or one name with its options, in order."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: at least one is needed")
        for number, entry in enumerate(self.stages, start=1):
            if not _is_entry(entry):
                raise ValueError(
                    f"stages: entry {number} is the name of a stage, or one name with its options such as "
                    f"`segment: {{min_frames: 17}}`, not {entry!r}"
                )

    def steps(self) -> list[tuple[str, Options]]:
        """Stages with their options."""
        pairs = [(entry, None) if isinstance(entry, str) else next(iter(entry.items())) for entry in self.stages]
        return [(name, dict(options or {})) for name, options in pairs]


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, str):
        return True
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((name, options),) = entry.items()
    return isinstance(name, str) and (options is None or isinstance(options, dict))


@dataclass(frozen=True)
class Step:
    """One stage, ready to run."""

    name: str
    stage: str
    source: Path
    out: Path | None
    argv: tuple[str, ...]
    """Its command line without --in, --out and --json."""
    spread: bool
    """Has --shard and --engine."""
    report: Path | None = None
    """Folder of its plots."""

    def run(self) -> StageRun:
        """Run the stage in this process.

        Raises:
            UserError: of the stage.
        """
        place = [f"--in={self.source}", *([f"--out={self.out}"] if self.out else [])]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                code = _main_of(self.stage)([*place, *self.argv, "--json"])
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        return StageRun(self.name, self.stage, str(self.out or self.source), code or 0, _last_json(printed.getvalue()))


@dataclass(frozen=True)
class Run:
    """What the command line adds to a recipe."""

    source: Path | None = None
    work: Path | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    """Options for all stages that have them, such as workers; a stage's own go before them."""
    only: str | None = None
    """Run this stage alone."""
    until: str | None = None
    """Run up to and with this stage."""


def run_recipe(path: Path, run: Run) -> list[StageRun]:
    """Run the stages; a report stands in WORK/report.md and .json after each.

    Raises:
        UserError: the recipe is wrong (nothing has run then), or a stage's own error.
    """
    work, steps = plan(path, run)
    if run.only:
        step = _chosen(steps, run.only, "--only")
        if "shard" in run.common and not step.spread:
            raise UserError(f"--shard {run.common['shard']}: {step.name} has no shards")
        # Tasks of an array are at work in one folder; the stage's own locks keep them apart.
        return [step.run()]
    with run_lock(work / ".run.lock", work):
        known = {(done.name, done.output): done for done in read_runs(work)}
        runs: list[StageRun] = []
        last = _chosen(steps, run.until, "--until") if run.until else steps[-1]
        for step in steps[: steps.index(last) + 1]:
            done = step.run()
            earlier = known.get((done.name, done.output))
            if earlier and done.report.get("up_to_date"):
                done = replace(done, seconds_earlier=earlier.seconds)
            runs.append(done)
            write_run_report(work, path, runs, {s.name: s.report for s in steps if s.report})
            if done.exit_code:
                break
    return runs


def plan(path: Path, run: Run) -> tuple[Path, list[Step]]:
    """Work folder and steps of a recipe, all options checked.

    Raises:
        UserError: an unknown stage or option, a wrong value, or no source or work folder.
    """
    recipe = load_config(Recipe, path)
    base = path.absolute().parent
    source = run.source or (base / recipe.source if recipe.source else None)
    work = run.work or (base / recipe.work if recipe.work else None)
    if source is None or work is None:
        missing = "source (or --in)" if source is None else "work (or --work)"
        raise UserError(f"recipe {path}: {missing} is not given")
    steps: list[Step] = []
    for number, (stage, options) in enumerate(recipe.steps(), start=1):
        try:
            step = _step(number, stage, options, source, work, base, run.common)
        except UserError as error:
            raise UserError(f"recipe {path}, stage {number} ({stage}): {error}") from None
        steps.append(step)
        source = source if stage in _ONLY_LOOK else step.out or source
    return work, steps


def _step(
    number: int, stage: str, options: Options, source: Path, work: Path, base: Path, common: Mapping[str, Any]
) -> Step:
    known = [name for name in STAGES if name not in _NO_STAGES]
    if stage not in known:
        raise UserError(f"no such stage{_nearest(stage, known)}; stages: {', '.join(known)}")
    name = f"{number}-{stage}"
    main = _main_of(stage)
    parser = checked_parser(main, None)
    actions = {option: action for action in parser._actions for option in action.option_strings}
    options = {**{key: value for key, value in common.items() if _option(key) in actions}, **options}
    report = None
    if "--report" in actions:
        report = work / f"{name}.report"
        options.setdefault("report", str(report))
    out = _out_path(actions.get("--out"), work / name)
    argv = tuple(part for key, value in options.items() for part in _argument(key, value, actions, work, base))
    checked_parser(main, [f"--in={source}", *([f"--out={out}"] if out else []), *argv])
    return Step(name, stage, source, out, argv, "--shard" in actions, report)


def _out_path(action: argparse.Action | None, path: Path) -> Path | None:
    if action is None:
        return None
    return path.with_name(path.name + ".parquet") if action.metavar == "MANIFEST" else path


def _argument(key: str, value: Any, actions: Mapping[str, argparse.Action], work: Path, base: Path) -> list[str]:
    option = _option(key)
    action = actions.get(option)
    if action is None or option in ("--in", "--out", "--json", "--help"):
        own = sorted(name[2:].replace("-", "_") for name in set(actions) - {"--in", "--out", "--json", "--help", "-h"})
        raise UserError(f"unknown option {key!r}{_nearest(key, own)}; it has: {', '.join(own)}")
    if value is None or value is False:
        return []
    if action.nargs == 0:
        if value is not True:
            raise UserError(f"{key}={value!r} must be true or false")
        return [option]
    texts = [_text(key, one, action, work, base) for one in (value if isinstance(value, list) else [value])]
    if action.nargs in ("+", "*"):
        return [option, *texts]
    return [f"{option}={','.join(texts)}"]


def _text(key: str, value: Any, action: argparse.Action, work: Path, base: Path) -> str:
    if isinstance(value, dict | list | bool):
        raise UserError(f"{key}={value!r} must be a number, a text or a list of them")
    text = str(value).replace("{work}", str(work.absolute()))
    return str(base / text) if action.type is Path else text


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _option(key: str) -> str:
    return "--" + str(key).replace("_", "-")


def _chosen(steps: Sequence[Step], name: str, option: str) -> Step:
    matching = [step for step in steps if name in (step.name, step.stage)]
    if len(matching) != 1:
        names = ", ".join(step.name for step in steps)
        raise UserError(f"{option} {name} fits {len(matching)} of the recipe's stages, not one; they are: {names}")
    return matching[0]


def _main_of(stage: str) -> Any:
    return importlib.import_module(STAGES[stage][0]).main


def _last_json(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            report: dict[str, Any] = json.loads(line)
            return report
    return {}


def exit_code(runs: Sequence[StageRun]) -> int:
    """Of the whole recipe: bad input where a stage says so."""
    return BAD_INPUT_EXIT_CODE if any(run.exit_code for run in runs) else 0
