"""`megatron-video slurm submit pretrain|curriculum|vae|dpo`: a training that signals, requeues and resumes by itself.

The configuration is resolved now, by the training's own command, and frozen in the job's folder: presets and files that
are edited later change nothing. The same command's dry run then says whether the job could run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_video.errors import UserError
from slurm.job import CONFIG_FILE, Kind
from slurm.launch import training_options
from slurm.profile import ClusterProfile
from slurm.snapshot import source_root
from slurm.submission import Request, add_submission_options, check_options, planned_job, read_profile, submit_or_show

SCRIPT = "pretrain.sbatch"


@dataclass(frozen=True)
class Training:
    """A kind of training: how its command is called, and what of its configuration matters here."""

    kind: Kind
    module: tuple[str, ...]
    """Words after `python`."""
    output: Callable[[dict[str, Any]], str]
    """The run's folder, of the resolved configuration."""
    relocated: Callable[[dict[str, Any], str], dict[str, Any]]
    """The configuration, as the command takes it back, with another folder."""
    example: str


@dataclass(frozen=True)
class Caller:
    """How the training's own command is called for its opinion."""

    cwd: Path
    """Where relative paths begin."""
    code: Path
    """Folder of the packages that the job will run, even where another version is installed."""

    def call(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` to its end."""
        environment = os.environ | {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=self.cwd)


def _relocate_pretrain(values: dict[str, Any], folder: str) -> dict[str, Any]:
    values["run"]["output_dir"] = folder
    return values


def _curriculum_folder(stages: dict[str, Any]) -> str:
    first: str = next(iter(stages.values()))["run"]["output_dir"]
    return str(Path(first).parent)


def _relocate_curriculum(stages: dict[str, Any], folder: str) -> dict[str, Any]:
    """The curriculum whose stages resolve to just these: every field of a stage is in its settings.

    `--print-config` of a curriculum shows its stages and not what they were made of.
    """
    frozen: dict[str, Any] = {}
    for number, (name, values) in enumerate(stages.items()):
        run, take = values["run"], "weights"
        if number:
            # What the curriculum itself derives from `take` and the order of the stages.
            run.pop("initial_weights")
            ema, optimizer = run.pop("initial_from_ema"), run.pop("initial_optimizer")
            take = "ema" if ema else "weights_and_optimizer" if optimizer else "weights"
        run.pop("output_dir")
        frozen[name] = {"take": take, "settings": values}
    return {"output_dir": folder, "stages": frozen}


def _relocate_vae(values: dict[str, Any], folder: str) -> dict[str, Any]:
    return values | {"output": folder}


TRAININGS: dict[str, Training] = {
    "pretrain": Training(
        "pretrain",
        ("-m", "training.pretrain"),
        lambda values: str(values["run"]["output_dir"]),
        _relocate_pretrain,
        "--config step_video_30b_t2i_256_s1 run.output_dir=runs/s1 data.shards=[shards/256]",
    ),
    "curriculum": Training(
        "curriculum",
        ("-m", "training.curriculum"),
        _curriculum_folder,
        _relocate_curriculum,
        "--config step_video_30b output_dir=runs/30b common.data.shards=[shards]",
    ),
    "vae": Training(
        "vae",
        ("-m", "training.train_vae", "train"),
        lambda values: str(values["output"]),
        _relocate_vae,
        "--config vae_paper manifest=m.parquet output=runs/vae",
    ),
    "dpo": Training(
        "dpo",
        ("-m", "training.alignment.command", "train"),
        lambda values: str(values["run"]["output_dir"]),
        _relocate_pretrain,
        "--config step_video_30b_dpo run.output_dir=runs/dpo data.shards=[pairs] run.initial_weights=runs/sft",
    ),
}


def submit_training(kind: str, argv: Sequence[str]) -> int:
    """Command line of `megatron-video slurm submit KIND` for a training.

    Raises:
        UserError: naming every reason why it is not submitted.
    """
    training, arguments = TRAININGS[kind], parse(kind, argv)
    profile = read_profile(arguments)
    return submit_or_show(prepare(training, profile, arguments), arguments)


def prepare(
    training: Training,
    profile: ClusterProfile,
    arguments: argparse.Namespace,
    cwd: Path | None = None,
    code: Path | None = None,
) -> Request:
    """The job of a training: its configuration resolved, its dry run done.

    Args:
        training: its kind.
        profile: of the cluster.
        arguments: of `parse`.
        cwd: where relative paths begin and the job runs; None: here.
        code: folder of the packages that will run; None: those that run now.

    Raises:
        UserError: a configuration that the training refuses.
    """
    check_options(arguments)
    cwd = cwd or Path.cwd()
    caller = Caller(cwd, code or source_root())
    resolved = resolve(training, arguments.config, arguments.overrides, caller)
    run_dir = cwd / training.output(resolved)
    config = yaml.safe_dump(training.relocated(resolved, str(run_dir)), sort_keys=False, allow_unicode=True)
    through = ["--through", arguments.through] if getattr(arguments, "through", None) else []
    job = planned_job(
        arguments,
        run_dir,
        kind=training.kind,
        command=[*training.module, "--config", f"{{folder}}/{CONFIG_FILE}", *through],
        gpus_per_node=profile.slurm.gpus_per_node,
        cwd=cwd,
    )
    skipped, ranks = "dry-run" in arguments.no_check, job.nodes * profile.ranks_per_node
    problems, checked = ([], []) if skipped else dry_run_of(training, profile, config, ranks, caller)
    return Request(
        job=job,
        profile=profile,
        script=SCRIPT,
        options=training_options(job, profile),
        config=config,
        chain=arguments.chain,
        warned=True,
        problems=problems,
        checked=checked,
    )


def resolve(training: Training, config: str, overrides: Sequence[str], caller: Caller) -> dict[str, Any]:
    """The configuration as the training's own command resolves it.

    Raises:
        UserError: in that command's words.
    """
    result = caller.call([*training.module, "--config", config, "--print-config", *overrides])
    if result.returncode:
        raise UserError(_said(result))
    values: dict[str, Any] = yaml.safe_load(result.stdout)
    return values


def dry_run_of(
    training: Training, profile: ClusterProfile, config: str, ranks: int, caller: Caller
) -> tuple[list[str], list[str]]:
    """Problems, and what was found out, by the training's own --dry-run for so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(config, encoding="utf-8")
        cluster = ["--cluster", profile.planner_cluster] if profile.planner_cluster else []
        words = [*training.module, "--config", str(path), "--dry-run", "--gpus", str(ranks), *cluster, "--json"]
        result = caller.call(words)
    if "unrecognized arguments: --dry-run" in result.stderr:
        return [], [f"by no dry run: {training.kind} has none; layout, data and memory are not known to fit"]
    return _verdict(result, ranks)


def _verdict(result: subprocess.CompletedProcess[str], ranks: int) -> tuple[list[str], list[str]]:
    """What the dry run's JSON says; without one it ended in a way that nobody expected."""
    head = f"dry run on {ranks} ranks"
    try:
        found = json.loads(result.stdout)
        problems, open_questions, notes = (list(found[key]) for key in ("problems", "not_checked", "notes"))
    except (ValueError, KeyError, TypeError):
        return [f"{head}: {_said(result)}"], []
    if result.returncode:
        return [f"{head}: {problem}" for problem in problems], []
    told = [f"{head}: it can run"]
    told += [f"{head}, note: {note}" for note in notes]
    return [], told + [f"{head}, not looked at: {what}" for what in open_questions]


def _said(result: subprocess.CompletedProcess[str]) -> str:
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["no word"]
    start = next((number for number, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
    return "\n  ".join([lines[start].removeprefix("error: "), *lines[start + 1 :]])


def parse(kind: str, argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of `slurm submit KIND`."""
    training = TRAININGS[kind]
    parser = argparse.ArgumentParser(
        prog=f"megatron-video slurm submit {kind}",
        description=__doc__,
        epilog=f"Example: megatron-video slurm submit {kind} --profile h100_pyxis --nodes 4 --time 1-00:00:00 "
        f"{training.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a YAML file or a preset of the training")
    if kind == "curriculum":
        parser.add_argument("--through", metavar="STAGE", help="end the job after this stage")
    add_submission_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="of the training's configuration")
    # Overrides may stand between options.
    return parser.parse_intermixed_args(argv)
