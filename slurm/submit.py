"""`megatron-video slurm submit KIND`: check a job, freeze its code and configuration, hand it to SLURM.

`submit_job` is what every kind of job ends in; the kinds are a table of modules.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from slurm import scheduler
from slurm.checks import TRAININGS
from slurm.command import call_from_table
from slurm.job import CONFIG_FILE, Job, resource_options
from slurm.profile import ClusterProfile
from slurm.snapshot import link_snapshot, take_snapshot
from slurm.submitted import record_submission

# kind of job -> (module with main(argv), one line of help)
KINDS: dict[str, tuple[str, str]] = {
    "pretrain": ("slurm.submit_training", "train the DiT on one or more nodes"),
    "curriculum": ("slurm.submit_training", "stages of pretraining, one after the other, as one job"),
    "vae": ("slurm.submit_training", "train the Video-VAE"),
    "dpo": ("slurm.submit_training", "train the DiT on preference pairs"),
    "data": ("slurm.data_chain", "a stage of data preparation, or a recipe, as arrays with joins"),
    "convert": ("slurm.convert_chain", "a checkpoint into another form, without GPUs; on demand back and compared"),
    "reshard": ("slurm.reshard_chain", "a checkpoint cut for another layout"),
    "evaluate": ("slurm.evaluate_chain", "samples of a checkpoint, or of all that a run writes, and their measure"),
    "stages": ("slurm.stages_chain", "stages of a curriculum, each a job with its own number of nodes"),
    "chain": ("slurm.submit_chain", "stages of any kind from a YAML file, each after those before it"),
}


def main(argv: Sequence[str]) -> int | None:
    """Command line of `megatron-video slurm submit`."""
    if argv and argv[0] in TRAININGS:
        from slurm.submit_training import submit_training

        return submit_training(argv[0], argv[1:])
    return call_from_table("megatron-video slurm submit", KINDS, argv)


def submit_job(
    job: Job,
    profile: ClusterProfile,
    *,
    script: str,
    options: Sequence[str] = (),
    config: str | None = None,
    chain: int = 1,
    code_of: Path | None = None,
) -> str:
    """Write the folder of a job, which `slurm.job.next_folder` made, and hand it to SLURM.

    Args:
        script: batch script of this package, such as pretrain.sbatch; it gets the job's folder as its argument.
        options: of sbatch, beside those of the job and the profile: --signal=B:USR1@300, --requeue.
        config: text of the job's config.yaml.
        chain: jobs to queue, each after the end of the one before, however that ended.
        code_of: folder of an earlier job whose code is used again, instead of the code as it is now.

    Returns:
        The number of the job that others should wait for: the last of a chain.

    Raises:
        UserError: a snapshot that is too large, or SLURM refused; the job's folder is removed then.
    """
    numbers: list[str] = []
    try:
        if code_of is None:
            take_snapshot(job.code)
        else:
            link_snapshot(code_of, job.code)
        job.save(profile)
        if config is not None:
            (job.folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        batch = str(job.code / "slurm" / script)
        words = sbatch_options(job, profile, options)
        for _ in range(chain):
            waits = [f"--dependency={','.join([*job.after, f'afterany:{numbers[-1]}'])}"] if numbers else []
            numbers.append(scheduler.submit([*words, *waits], batch, [str(job.folder)]))
            record_submission(job, numbers, [*words, batch, str(job.folder)], script, list(options))
    except BaseException:
        # A chain of which a part is queued is no chain.
        _take_back(job, numbers)
        shutil.rmtree(job.folder, ignore_errors=True)
        raise
    return numbers[-1]


def _take_back(job: Job, numbers: Sequence[str]) -> None:
    """Cancel what was queued of a submission that failed, also what sbatch had no time to tell the number of."""
    with contextlib.suppress(scheduler.SlurmError):
        named = {live.job_id.split("_")[0] for live in scheduler.queued(f"--name={job.name}", "--me", patience=5.0)}
        mine = {number for number in named if _runs_from(number, job.folder)} | set(numbers)
        if mine:
            scheduler.ask("scancel", *sorted(mine))


def _runs_from(number: str, folder: Path) -> bool:
    records = scheduler.job_records(number)
    return any(record.get("Command", "").startswith(f"{folder}/") for record in records)


def sbatch_options(job: Job, profile: ClusterProfile, options: Sequence[str] = ()) -> list[str]:
    """All that sbatch is given before the script."""
    number = "%A_%a" if job.tasks is not None else "%j"
    # Of whoever submits, only what the profile names: a job must not depend on what happened to be set in a shell.
    return [
        *resource_options(job, profile),
        f"--chdir={job.cwd}",
        f"--output={job.folder}/slurm-{number}.out",
        "--open-mode=append",
        f"--export={','.join(profile.pass_environment) or 'NONE'}",
        *options,
    ]
