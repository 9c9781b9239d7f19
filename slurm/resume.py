"""`megatron-video slurm resume RUN|NAME|JOB [group.field=value ...]`: submit a run again, as its newest job was.

Same folder, profile and configuration unless options say otherwise; the code as it is now, or with --same-code that of
the newest job. STOP is removed; a run that may not be started again (NO_RESTART) or is finished (DONE) needs --force.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_video.errors import UserError
from slurm.chain_commands import resume_chain
from slurm.chain_record import find_chain
from slurm.checks import show_time
from slurm.job import CODE_FOLDER, CONFIG_FILE, PROFILE_FILE, Job, load_job
from slurm.known_jobs import find_folder
from slurm.profile import ClusterProfile, load_profile
from slurm.submission import Request, add_submission_options, planned_job, submit_or_show
from slurm.submit_training import TRAININGS, prepare
from slurm.submitted import read_submitted


def main(argv: Sequence[str]) -> int:
    """Submit a run again.

    Raises:
        UserError: naming every reason why it is not submitted.
    """
    arguments = _parse(argv)
    if (chain := find_chain(arguments.what)) is not None:
        return resume_chain(chain, arguments)
    folder = find_folder(arguments.what)
    job, _ = load_job(folder)
    profile = load_profile(arguments.profile or folder / PROFILE_FILE, arguments.set)
    _fill(arguments, job, folder)
    if job.kind in TRAININGS:
        request = _training(job, profile, folder, arguments)
    else:
        request = _other(job, profile, folder, arguments)
    request = dataclasses.replace(request, resuming=True, code_of=folder if arguments.same_code else None)
    return submit_or_show(request, arguments)


def _fill(arguments: argparse.Namespace, job: Job, folder: Path) -> None:
    """What no option says is as it was."""
    arguments.name = arguments.name or job.name
    arguments.nodes = arguments.nodes or job.nodes
    arguments.spares = job.spare_nodes if arguments.spares is None else arguments.spares
    arguments.time = arguments.time or (show_time(job.seconds) if job.seconds else None)
    arguments.chain = arguments.chain or len(read_submitted(folder).jobs)
    arguments.config = str(folder / CONFIG_FILE)
    words = job.command
    arguments.through = words[words.index("--through") + 1] if "--through" in words else None


def _training(job: Job, profile: ClusterProfile, folder: Path, arguments: argparse.Namespace) -> Request:
    """With the frozen configuration, resolved anew with the overrides; paths in it mean what they meant then."""
    code = folder / CODE_FOLDER if arguments.same_code else None
    request = prepare(TRAININGS[job.kind], profile, arguments, cwd=job.cwd, code=code)
    if request.job.run_dir != job.run_dir:
        raise UserError(
            f"the overrides name another folder, {request.job.run_dir}; to begin a run there, use megatron-video slurm "
            f"submit {job.kind}"
        )
    # What was kept for other parts of this package, such as the chain it belongs to.
    return dataclasses.replace(request, job=dataclasses.replace(request.job, options=job.options))


def _other(job: Job, profile: ClusterProfile, folder: Path, arguments: argparse.Namespace) -> Request:
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: a job of kind {job.kind} has no configuration; submit a new one")
    submitted = read_submitted(folder)
    asked = planned_job(arguments, job.run_dir, kind=job.kind, command=[])
    again = dataclasses.replace(
        job,
        **{name: getattr(asked, name) for name in ("name", "folder", "nodes", "spare_nodes", "seconds", "after")},
        command=[word.replace(str(folder), "{folder}") for word in job.command],
    )
    return Request(again, profile, submitted.script, submitted.options, chain=arguments.chain)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video slurm resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="RUN|NAME|JOB", help="run's folder, job's name or number")
    parser.add_argument("--same-code", action="store_true", help="the code of the newest job, not as it is now")
    add_submission_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="of the training's configuration")
    # Unlike in a first submission, nothing said means: as it was.
    parser.set_defaults(profile=None, nodes=None, spares=None, chain=None)
    arguments = parser.parse_intermixed_args(argv)
    for name in ("nodes", "chain"):
        if getattr(arguments, name) == 0:
            raise UserError(f"--{name} 0 must be at least 1")
    return arguments
