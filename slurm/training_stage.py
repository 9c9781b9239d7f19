"""A training as a stage of a chain: the job that `slurm submit pretrain` or `curriculum` would make, with records of
its own in the stage's run folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_video.errors import UserError
from slurm.ask_command import given
from slurm.job import CONFIG_FILE, Job
from slurm.launch import training_options
from slurm.profile import ClusterProfile
from slurm.submission import Request
from slurm.submit_training import SCRIPT, TRAININGS, parse, prepare

if TYPE_CHECKING:
    from slurm.chain import ChainStage
    from slurm.chain_record import ChainRecord


def training_request(stage: ChainStage, name: str, profile: ClusterProfile, record: ChainRecord) -> Request:
    """The job of a training stage; its configuration is resolved and frozen by the training's own command.

    Raises:
        UserError: a kind that `slurm submit` has not, or a configuration that the training refuses.
    """
    if stage.kind not in TRAININGS:
        kinds = ", ".join(TRAININGS)
        raise UserError(f"stage {stage.name}: kind={stage.kind} is no training of `slurm submit`: {kinds}")
    run_dir = (record.cwd / str(stage.run_dir)).absolute()
    own: dict[str, Any] = {
        "name": name,
        "run_dir": run_dir,
        "folder": run_dir / "slurm" / f"NNNN-{name}",
        "cwd": record.cwd,
        "options": {"chain": str(record.folder)},
    }
    config = Path(given("--config", stage.command) or "")
    if record.folder in config.parents:
        return _frozen(stage, config, profile, own)
    words = [*_arguments(stage), f"--nodes={stage.nodes}", f"--name={name}"]
    words += [f"--time={stage.time}"] if stage.time else []
    # A stage's own weights come from the one before, which is not there yet: its dry run could only say so.
    arguments = parse(stage.kind, [*words, "--no-check=dry-run"])
    request = prepare(TRAININGS[stage.kind], profile, arguments, cwd=record.cwd)
    return replace(request, job=replace(request.job, **own))


def _frozen(stage: ChainStage, config: Path, profile: ClusterProfile, own: dict[str, Any]) -> Request:
    """With a configuration that was resolved when the chain was submitted: again would take seconds a stage."""
    through = given("--through", stage.command)
    module = TRAININGS[stage.kind].module
    job = Job(
        **own,
        kind=stage.kind,
        command=[*module, "--config", f"{{folder}}/{CONFIG_FILE}", *(["--through", through] if through else [])],
        nodes=stage.nodes,
        gpus_per_node=profile.slurm.gpus_per_node,
        seconds=stage.seconds,
    )
    text = config.read_text(encoding="utf-8")
    return Request(job, profile, SCRIPT, options=training_options(job, profile), config=text, warned=True)


def _arguments(stage: ChainStage) -> list[str]:
    # `vae train`: the second word belongs to what is called, not to its arguments.
    own, words = list(TRAININGS[stage.kind].module[2:]), stage.command[1:]
    return words[len(own) :] if words[: len(own)] == own else words
