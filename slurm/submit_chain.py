"""`megatron-video slurm submit chain FILE`: stages that wait for each other, submitted together, all or none.

The file is described in slurm/chain.py. What one stage makes another reads; a stage that fails cancels those behind it,
and `megatron-video slurm resume RUN_DIR` goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_video.errors import FULL_DISK, UserError
from slurm.chain import Chain, load_chain, safe_name
from slurm.chain_record import ChainRecord, new_record
from slurm.chain_submit import Submission, all_units, rivals
from slurm.job import SLURM_FOLDER
from slurm.submission import Request, add_submission_options, check_options, planned_job, read_profile
from slurm.submit import sbatch_options


@dataclass(frozen=True)
class Planned:
    """A chain as a command made it."""

    chain: Chain
    checked: list[str] = field(default_factory=list)
    """What the command has found out; told with the submission."""
    files: dict[str, str] = field(default_factory=dict)
    """Texts that are kept in the chain's folder; {chain} in a command stands for it."""


def main(argv: Sequence[str]) -> int:
    """Command line of `submit chain`."""
    parser = chain_parser("chain", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML with the stages")
    arguments, words = read_options(parser, argv)
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    chain = load_chain(arguments.file)
    if arguments.name:
        chain = dataclasses.replace(chain, name=safe_name(arguments.name))
    return submit_chain(Planned(chain), arguments)


def chain_parser(kind: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a kind that ends in `submit_chain`."""
    parser = argparse.ArgumentParser(
        prog=f"megatron-video slurm submit {kind}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_submission_options(parser, nodes=False, training=False)
    return parser


def read_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse; the words that the parser does not know are those of the command that becomes the job.

    Raises:
        UserError: --name, --time or --after that cannot be.
    """
    arguments, words = parser.parse_known_args(argv)
    check_options(arguments)
    return arguments, words


def submit_chain(planned: Planned, arguments: argparse.Namespace) -> int:
    """Check all stages of a chain; then submit them, or with --dry-run show what would be submitted.

    Raises:
        UserError: naming every problem found; nothing is submitted then.
    """
    chain, profile = planned.chain, read_profile(arguments)
    # Read as every kind of submission reads them, so that they are refused in the same words.
    after = planned_job(arguments, Path(chain.run_dir), kind="command", command=[]).after
    refuse([] if "live" in arguments.no_check else rivals(chain))
    with _open_record(planned) as record:
        submission = Submission(record, profile, after, arguments.no_check, arguments.local_run_folder)
        todo = all_units(record.chain)
        requests = submission.requests(todo)
        problems, notes = submission.problems(requests)
        refuse(problems)
        if arguments.dry_run:
            _show(requests, planned, notes, arguments)
            raise _NothingSubmitted
        record.save()
        numbers = submission.submit(todo, requests)
        tell(record, numbers, [*planned.checked, *notes], arguments)
    return 0


def refuse(problems: Sequence[str]) -> None:
    """Stop if there is a problem.

    Raises:
        UserError: with all of them.
    """
    if problems:
        raise UserError("not submitted:\n  " + "\n  ".join(problems))


def tell(record: ChainRecord, numbers: Sequence[str], notes: Sequence[str], arguments: argparse.Namespace) -> None:
    """Say what was submitted."""
    what = record.chain.output or str(record.folder)
    newest = {stage: jobs[-1] for stage, jobs in record.jobs.items() if jobs[-1].number in numbers}
    if arguments.json:
        jobs = {stage: {"job": job.number, "folder": job.folder, "units": job.units} for stage, job in newest.items()}
        told = {"submitted": True, "chain": record.chain.name, "folder": str(record.folder), "output": what}
        print(json.dumps(told | {"jobs": jobs, "notes": list(notes)}, indent=1))
        return
    for stage, job in newest.items():
        units = f", {len(job.units)} units" if record.chain.stage(stage).array else ""
        print(f"job {job.number}: {record.chain.name}-{stage}{units}")
    print(f"folder  {record.folder}")
    print("".join(f"note    {note}\n" for note in notes), end="")
    print(f"follow  megatron-video slurm status {what}\nstop    megatron-video slurm cancel {what}")


class _NothingSubmitted(Exception):  # noqa: N818
    """Leaves the block of a record that is not to stay."""


@contextlib.contextmanager
def _open_record(planned: Planned) -> Iterator[ChainRecord]:
    """A chain's folder with its files; without a submission it goes again, with the folders made for it."""
    run_dir = Path(planned.chain.run_dir).absolute()
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        record = new_record(planned.chain)
    except OSError as error:
        why = FULL_DISK.get(error.errno or 0, error.strerror)
        raise UserError(f"run folder {run_dir}: {error.filename}: {why}; name another") from None
    try:
        for name, text in planned.files.items():
            (record.folder / name).write_text(text, encoding="utf-8")
        record.chain = _in_folder(planned.chain, record.folder)
        yield record
    except BaseException as error:
        shutil.rmtree(record.folder, ignore_errors=True)
        for path in (record.folder.parent, run_dir / SLURM_FOLDER, *made):
            with contextlib.suppress(OSError):
                path.rmdir()
        if not isinstance(error, _NothingSubmitted):
            raise


def _in_folder(chain: Chain, folder: Path) -> Chain:
    def filled(words: list[str]) -> list[str]:
        return [word.replace("{chain}", str(folder)) for word in words]

    stages = [dataclasses.replace(stage, command=filled(stage.command)) for stage in chain.stages]
    return dataclasses.replace(chain, stages=stages)


def _show(requests: Sequence[Request], planned: Planned, notes: Sequence[str], arguments: argparse.Namespace) -> None:
    chain = planned.chain
    shown: list[dict[str, Any]] = []
    for stage, request in zip(chain.stages, requests, strict=True):
        options = sbatch_options(request.job, request.profile, request.options)
        waits = [*(f"afterok:{name}" for name in chain.awaited(stage)), *(f"afterany:{x}" for x in stage.after_any)]
        shown.append(
            {"stage": stage.name, "command": stage.command, "waits_for": waits, "sbatch": ["sbatch", *options]}
        )
    if arguments.json:
        print(json.dumps({"submitted": False, "stages": shown, "notes": [*planned.checked, *notes]}, indent=1))
        return
    for entry in shown:
        after = f", after {', '.join(entry['waits_for'])}" if entry["waits_for"] else ""
        print(
            f"{entry['stage']}{after}\n  megatron-video {shlex.join(entry['command'])}\n  {shlex.join(entry['sbatch'])}"
        )
    print("".join(f"note    {note}\n" for note in (*planned.checked, *notes)) + "nothing was submitted (--dry-run)")
