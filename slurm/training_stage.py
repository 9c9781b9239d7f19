"""A training as a stage of a chain: the job that `slurm submit pretrain` or `curriculum` would make, with records of
its own in the stage's run folder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_video.errors import UserError
from slurm.profile import ClusterProfile
from slurm.submission import Request
from slurm.submit_training import TRAININGS, parse, prepare

if TYPE_CHECKING:
    from slurm.chain import ChainStage
    from slurm.chain_record import ChainRecord


def training_request(stage: ChainStage, name: str, profile: ClusterProfile, record: ChainRecord) -> Request:
    """The job of a training stage; its configuration is resolved and frozen by the training's own command.

    Raises:
        UserError: a kind that `slurm submit` has not, or a configuration that the training refuses.
    """
    if stage.kind not in TRAININGS:
        raise UserError(
            f"stage {stage.name}: kind={stage.kind} is no training of `slurm submit`: {', '.join(TRAININGS)}"
        )
    training, words = TRAININGS[stage.kind], stage.command[1:]
    # `vae train`: the second word belongs to what is called, not to its arguments.
    own = list(training.module[2:])
    words = words[len(own) :] if words[: len(own)] == own else words
    words = [*words, f"--nodes={stage.nodes}", f"--name={name}"]
    words += [f"--time={stage.time}"] if stage.time else []
    # A stage's own weights come from the one before, which is not there yet: its dry run could only say so.
    arguments = parse(stage.kind, [*words, "--no-check=dry-run"])
    request = prepare(training, profile, arguments, cwd=record.cwd)
    run_dir = (record.cwd / str(stage.run_dir)).absolute()
    job = replace(
        request.job,
        run_dir=run_dir,
        folder=run_dir / "slurm" / f"NNNN-{name}",
        cwd=record.cwd,
        options={**request.job.options, "chain": str(record.folder)},
    )
    return replace(request, job=job)
