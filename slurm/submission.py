"""What all kinds of `megatron-video slurm submit` share: their options, and the way from a job to SLURM's number.

A kind builds a `Job` whose folder is still open (`planned_job`; `{folder}` in its command stands for it) and calls
`submit_or_show`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_video.errors import FULL_DISK, UserError
from megatron_video.run_lock import LockedError, run_lock
from slurm import scheduler
from slurm.checks import CHECKS, Findings, Plan, check, show_time
from slurm.job import (
    CODE_FOLDER,
    CONFIG_FILE,
    DONE,
    JOB_FILE,
    NO_RESTART,
    SLURM_FOLDER,
    STOP,
    Job,
    environment_script,
    next_folder,
)
from slurm.known_jobs import find_folder, remember
from slurm.live_jobs import base_number, competitors
from slurm.profile import ClusterProfile, load_profile
from slurm.snapshot import CODE_RECORD, source_root
from slurm.submit import sbatch_options, submit_job
from slurm.submitted import read_submitted

PROFILE_VARIABLE = "MEGATRON_VIDEO_PROFILE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_LOCK = "submit.lock"


@dataclass(frozen=True)
class Request:
    """A job and how it is to be submitted."""

    job: Job
    profile: ClusterProfile
    script: str
    """Batch script of this package, such as pretrain.sbatch."""
    options: Sequence[str] = ()
    """Of sbatch, beside those of job and profile."""
    config: str | None = None
    """Text of the job's config.yaml."""
    code_of: Path | None = None
    """Folder of an earlier job whose code is used again."""
    chain: int = 1
    resuming: bool = False
    """Whether it goes on with a run that was asked to stop."""
    warned: bool = False
    """Whether it is signalled before its time ends."""
    checked: list[str] = field(default_factory=list)
    """What the kind itself has found out, such as the dry run's verdict; told with the submission."""
    problems: list[str] = field(default_factory=list)
    """Why, by the kind's own checks, it must not be submitted."""


def add_submission_options(parser: argparse.ArgumentParser, nodes: bool = True, training: bool = True) -> None:
    """Options of every kind; `nodes`: those of jobs that may have several nodes; `training`: those of trainings."""
    group = parser.add_argument_group("submission")
    group.add_argument(
        "--profile",
        default=os.environ.get(PROFILE_VARIABLE),
        help=f"cluster profile: a YAML file or a name in slurm/profiles (default: ${PROFILE_VARIABLE})",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="override a field of the profile, e.g. slurm.partition=long; may be repeated",
    )
    group.add_argument("--name", help="of the job (default: the name of the run's folder)")
    if nodes:
        group.add_argument("--nodes", type=int, default=1, help="nodes that train (default: %(default)s)")
        group.add_argument("--spares", type=int, default=0, help="further nodes that replace those that fail")
    group.add_argument(
        "--time", metavar="D-HH:MM:SS", help="wall time, as SLURM writes it (default: what the partition allows)"
    )
    if training:
        group.add_argument(
            "--chain",
            type=int,
            default=1,
            metavar="K",
            help="queue K jobs, each after the end of the one before: for sites that forbid requeueing",
        )
        again = "start in spite of DONE, NO_RESTART or STOP in the run's folder"
        group.add_argument("--force", action="store_true", help=again)
    group.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start when JOB (number or name) has succeeded; or as --dependency takes it: afterany:17",
    )
    group.add_argument(
        "--no-check",
        action="append",
        default=[],
        metavar="WHAT",
        choices=[*CHECKS, "dry-run"],
        help=f"leave a check out: {', '.join([*CHECKS, 'dry-run'])}; may be repeated",
    )
    for option, meaning in (
        ("--local-run-folder", "all nodes see the run's folder, though it looks local"),
        ("--dry-run", "check, show everything that would be submitted, and leave"),
        ("--json", "print the result as JSON"),
    ):
        group.add_argument(option, action="store_true", help=meaning)


def read_profile(arguments: argparse.Namespace) -> ClusterProfile:
    """The profile that the options name.

    Raises:
        UserError: none is named, or it is not usable.
    """
    if arguments.profile is None:
        raise UserError(
            f"--profile is missing: name the cluster's profile, or set {PROFILE_VARIABLE}; see slurm/README.md"
        )
    return load_profile(arguments.profile, arguments.set)


def planned_job(arguments: argparse.Namespace, run_dir: Path, **fields: Any) -> Job:
    """A job by the options; `fields` are further ones of `Job`. Its folder is made when it is submitted.

    Raises:
        UserError: a name, count or time that cannot be.
    """
    run_dir = run_dir.absolute()
    name = arguments.name or run_dir.name
    check_options(arguments)
    _check_name(name)
    values: dict[str, Any] = {
        "name": name,
        "run_dir": run_dir,
        "folder": run_dir / SLURM_FOLDER / f"NNNN-{name}",
        "nodes": getattr(arguments, "nodes", 1),
        "spare_nodes": getattr(arguments, "spares", 0),
        "seconds": read_time(arguments.time),
        "after": [_dependency(text) for text in arguments.after],
    }
    return Job(**(values | fields))


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong with the options alone, before anything slow.

    Raises:
        UserError: a name, count, time or dependency that cannot be.
    """
    if arguments.name is not None:
        _check_name(arguments.name)
    for option in ("nodes", "chain"):
        if getattr(arguments, option, 1) < 1:
            raise UserError(f"--{option} {getattr(arguments, option)} must be at least 1")
    if getattr(arguments, "spares", 0) < 0:
        raise UserError(f"--spares {arguments.spares} must not be negative")
    read_time(arguments.time)
    for text in arguments.after:
        _dependency(text)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: use letters, digits, and _ . + - after the first")


def read_time(text: str | None) -> int | None:
    """Seconds of --time; None for the partition's own.

    Raises:
        UserError: not a time.
    """
    try:
        seconds = scheduler.parse_time(text) if text is not None else None
    except ValueError:
        seconds = 0
    if text is not None and not seconds:
        raise UserError(f"--time {text}: write it as SLURM does: minutes, hours:minutes:seconds, or 1-12:00:00")
    return seconds


def submit_or_show(request: Request, arguments: argparse.Namespace) -> int:
    """Check the job; then submit it and tell how to follow it, or with --dry-run show what would be submitted.

    Raises:
        UserError: naming every problem found.
    """
    request = dataclasses.replace(request, job=_with_time(request, arguments))
    plan = _plan(request, arguments)
    found = check(plan, arguments.no_check)
    problems = request.problems + found.problems
    if problems:
        raise UserError(_listed(problems))
    if arguments.dry_run:
        _show(request, found, arguments)
        return 0
    with _one_at_a_time(request.job):
        if "live" not in arguments.no_check:
            # Again, now that no other submission can come between.
            _refuse(list(competitors(request.job)))
        request, numbers = _submit(request, arguments)
    _tell(request, found, numbers, arguments)
    return 0


def _with_time(request: Request, arguments: argparse.Namespace) -> Job:
    """Without --time the partition decides, and how long that is must be known here."""
    job = request.job
    if job.seconds is not None or "cluster" in arguments.no_check:
        return job
    named = [word for word in sbatch_options(job, request.profile) if word.startswith("--partition=")]
    try:
        partition = scheduler.partition(named[-1].split("=", 1)[1] if named else None)
    except scheduler.SlurmAwayError:
        raise
    except scheduler.SlurmError:
        # The checks tell it, with all else that is wrong.
        return job
    seconds = partition.max_seconds or scheduler.parse_time(partition.fields.get("DefaultTime", ""))
    return dataclasses.replace(job, seconds=seconds)


def _plan(request: Request, arguments: argparse.Namespace) -> Plan:
    return Plan(
        job=request.job,
        profile=request.profile,
        sbatch=sbatch_options(request.job, request.profile, request.options),
        script=source_root() / "slurm" / request.script,
        warned=request.warned,
        force=arguments.force,
        resuming=request.resuming,
        local_run_folder=arguments.local_run_folder,
    )


def _submit(request: Request, arguments: argparse.Namespace) -> tuple[Request, list[str]]:
    job = request.job
    folder = next_folder(job.run_dir, job.name)
    command = [word.replace("{folder}", str(folder)) for word in job.command]
    job = dataclasses.replace(job, folder=folder, command=command)
    ignored = [DONE, NO_RESTART, STOP] if getattr(arguments, "force", False) else [STOP] if request.resuming else []
    for name in ignored:
        (job.slurm_dir / name).unlink(missing_ok=True)
    submit_job(
        job,
        request.profile,
        script=request.script,
        options=request.options,
        config=request.config,
        chain=request.chain,
        code_of=request.code_of,
    )
    numbers = read_submitted(folder).jobs
    _refuse_second(job, numbers)
    remember(job, numbers)
    return dataclasses.replace(request, job=job), numbers


def _refuse_second(job: Job, numbers: Sequence[str]) -> None:
    """Two submissions of one name for different runs hold different locks; the later one gives way."""
    others = {base_number(live.job_id) for live in scheduler.queued(f"--name={job.name}", "--me")} - set(numbers)
    earlier = [number for number in others if int(number) < int(numbers[0])]
    if earlier:
        scheduler.ask("scancel", *numbers)
        raise UserError(
            f"--name {job.name}: job {earlier[0]} of this name was submitted at the same moment; this one is cancelled"
        )


@contextlib.contextmanager
def _one_at_a_time(job: Job) -> Iterator[None]:
    path = job.slurm_dir / _LOCK
    try:
        with run_lock(path, job.run_dir):
            yield
    except LockedError as error:
        raise UserError(f"run folder {job.run_dir}: a job is being submitted for it at this moment; {error}") from None
    except PermissionError as error:
        raise UserError(f"run folder {job.run_dir}: {error.filename}: {error.strerror}; name another") from None
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"run folder {job.run_dir}: {FULL_DISK[error.errno]}; nothing was submitted; make room"
        ) from None


def _show(request: Request, found: Findings, arguments: argparse.Namespace) -> None:
    job, script = request.job, f"{request.job.folder}/{CODE_FOLDER}/slurm/{request.script}"
    words = ["sbatch", *sbatch_options(job, request.profile, request.options), script, str(job.folder)]
    environment = environment_script(job, request.profile)
    files = [JOB_FILE, "profile.yaml", "job.env", CODE_RECORD, f"{CODE_FOLDER}/", "submitted.json"]
    files += [CONFIG_FILE] if request.config is not None else []
    if arguments.json:
        shown = {"submitted": False, "sbatch": words, "job": job.as_plain(), "environment": environment, "files": files}
        print(json.dumps(shown | {"config": request.config, **_found(request, found, arguments)}, indent=1))
        return
    print(f"would submit {_summary(request)}\n")
    print(f"$ {shlex.join(words)}\n")
    for name, text in (("job.env", environment), (CONFIG_FILE, request.config), (script, _script_text(request.script))):
        if text is not None:
            print(f"== {name}\n{text.rstrip()}\n")
    print(f"in {job.folder}: {', '.join(sorted(files))}")
    print("\n".join(_remarks(request, found, arguments)))
    print("nothing was submitted (--dry-run)")


def _tell(request: Request, found: Findings, numbers: Sequence[str], arguments: argparse.Namespace) -> None:
    job, submitted = request.job, read_submitted(request.job.folder)
    code = json.loads((job.folder / CODE_RECORD).read_text(encoding="utf-8"))
    if arguments.json:
        told = {"submitted": True, "jobs": numbers, "folder": str(job.folder), "run": str(job.run_dir), "code": code}
        print(json.dumps(told | {"sbatch": submitted.sbatch, **_found(request, found, arguments)}, indent=1))
        return
    print(f"job {', '.join(numbers)}: {_summary(request)}")
    print(f"folder  {job.folder}")
    changed = " with changes (code.diff)" if code.get("changed") else ""
    commit = f"commit {code['commit'][:12]}{changed}, " if code.get("commit") else ""
    print(f"code    {commit}version {code['version']}, {code['files']} files, {code['bytes'] / 2**20:.0f} MiB")
    print(f"sbatch  {shlex.join(submitted.sbatch)}")
    print("\n".join(_remarks(request, found, arguments)))
    print(f"follow  megatron-video slurm status {numbers[0]}    megatron-video slurm logs {job.run_dir} --follow")
    print(f"stop    megatron-video slurm cancel {numbers[0]}")


def _summary(request: Request) -> str:
    job = request.job
    spare = f" + {job.spare_nodes} spare" if job.spare_nodes else ""
    gpus = f" x {job.gpus_per_node} GPUs" if job.gpus_per_node else ""
    tasks = f", {job.tasks} tasks" if job.tasks is not None else ""
    chain = f", a chain of {request.chain}" if request.chain > 1 else ""
    limit = f", {show_time(job.seconds)}" if job.seconds else ", no time limit"
    return f"{job.kind} {job.name}, {job.nodes}{spare} nodes{gpus}{tasks}{limit}{chain}"


def _remarks(request: Request, found: Findings, arguments: argparse.Namespace) -> list[str]:
    lines = [f"checked {line}" for line in request.checked]
    lines += [f"note    {note}" for note in found.notes]
    left_out = list(dict.fromkeys(arguments.no_check))
    return lines + ([f"not checked, as asked: {', '.join(left_out)}"] if left_out else [])


def _found(request: Request, found: Findings, arguments: argparse.Namespace) -> dict[str, Any]:
    return {"checked": request.checked, "notes": found.notes, "not_checked": arguments.no_check}


def _script_text(script: str) -> str | None:
    path = source_root() / "slurm" / script
    return path.read_text(encoding="utf-8") if path.exists() else None


def _dependency(text: str) -> str:
    if re.fullmatch(r"(after|afterany|afterok|afternotok):\d+(:\d+)*|singleton", text):
        return text
    if text.isdigit():
        return f"afterok:{text}"
    return f"afterok:{read_submitted(find_folder(text)).jobs[-1]}"


def _listed(problems: Sequence[str]) -> str:
    head = "not submitted" if len(problems) == 1 else f"not submitted, {len(problems)} problems"
    return f"{head}:\n  " + "\n  ".join(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserError(_listed(problems))
