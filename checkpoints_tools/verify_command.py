"""`megatron-video ckpt verify`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints_tools.diff_command import DIFFERENT_EXIT_CODE
from checkpoints_tools.forms import Reading, find_form
from checkpoints_tools.verify import UNFINISHED, Verdict, checkpoints_of
from checkpoints_tools.verify_weights import Wanted, verify_core, verify_weights, wanted_like, wanted_of_config
from checkpoints_tools.wording import tell_on_stderr
from megatron_video.errors import UserError


def add_command(commands: Any) -> None:
    """The subcommand `verify`."""
    command = commands.add_parser(
        "verify",
        help="is a checkpoint whole: checksums, completeness, finite values, the model that is wanted",
        description="Of any form. Exit code 0: whole, 1: damaged, incomplete, not finite, or of another model; "
        "everything that is wrong is named.",
    )
    command.add_argument("path", type=Path, help="run folder (its newest checkpoint), step folder, or other weights")
    command.add_argument("--all", action="store_true", help="all checkpoints of the run")
    command.add_argument("--quick", action="store_true", help="sizes and metadata only: no checksums, no values")
    command.add_argument("--config", metavar="FILE", help="must be its model: pretrain YAML or preset, or config.json")
    command.add_argument("--like", type=Path, metavar="CHECKPOINT", help="must be of the same model as this one")
    command.add_argument("--threads", type=int, default=4, help="files read at the same time (default 4)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.threads < 1:
        raise UserError(f"--threads {arguments.threads} must be at least 1")
    verdicts = []
    for verdict in _verdicts(arguments):
        verdicts.append(verdict)
        if not arguments.json:
            print("\n".join(_lines(verdict, arguments.quick)))
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(verdict), "whole": verdict.whole} for verdict in verdicts]))
    return 0 if all(verdict.whole for verdict in verdicts) else DIFFERENT_EXIT_CODE


def _verdicts(arguments: argparse.Namespace) -> Iterator[Verdict]:
    path: Path = arguments.path
    wanted = _wanted(arguments)
    if not path.exists():
        raise UserError(f"{path} is not there")
    if path.suffix not in UNFINISHED and find_form(path).name != "core":
        # Forms that do not say what they hold take the configuration for it.
        config = Path(arguments.config) if arguments.config and Path(arguments.config).is_file() else None
        yield verify_weights(path, Reading(config=config), wanted, arguments.quick)
        return
    for folder in checkpoints_of(path, arguments.all):
        yield verify_core(folder, wanted, arguments.quick, arguments.threads, tell_on_stderr)


def _wanted(arguments: argparse.Namespace) -> Wanted | None:
    if arguments.config and arguments.like:
        raise UserError("--config and --like both say what it should be; give one of them")
    if arguments.like:
        return wanted_like(arguments.like, Reading())
    return wanted_of_config(arguments.config) if arguments.config else None


def _lines(verdict: Verdict, quick: bool) -> Iterator[str]:
    yield f"{verdict.folder}: {'whole' if verdict.whole else 'FAULTY'}"
    yield from (f"  {fault}" for fault in verdict.faults)
    if verdict.without_checksum:
        yield f"  of {len(verdict.without_checksum)} files only the size was recorded"
    if quick:
        yield "  looked at sizes and metadata only"
    else:
        summed = verdict.files - len(verdict.without_checksum)
        files = f"{summed} files compared with their checksums; " if summed > 0 else ""
        yield f"  read: {files}{verdict.tensors} tensors, {verdict.values:,} values"
