"""`megatron-video ckpt`: convert, average, compare and check checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools import average, convert, diff_command, inspect_command, pipeline, prune, reshard, upcycle
from checkpoints_tools.verify import checkpoints_of, verify

DIFFERENT_EXIT_CODE = 1


def main(argv: Sequence[str]) -> int:
    """Run `megatron-video ckpt ...`."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-video ckpt", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert.add_command(commands)
    pipeline.add_command(commands)
    command = commands.add_parser(
        "verify",
        help="read a checkpoint and compare every file with the checksum it was written with",
        description="Exit code 0: whole, 1: damaged; every file that is wrong is named.",
    )
    command.add_argument("path", type=Path, help="run folder (its newest checkpoint) or step folder")
    command.add_argument("--all", action="store_true", help="all checkpoints of the run")
    command.add_argument("--threads", type=int, default=4, help="files read at the same time (default 4)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_verify)
    average.add_command(commands)
    upcycle.add_command(commands)
    diff_command.add_command(commands)
    inspect_command.add_command(commands)
    reshard.add_command(commands)
    prune.add_command(commands)
    return parser


def _verify(arguments: argparse.Namespace) -> int:
    verdicts = []
    for folder in checkpoints_of(arguments.path, arguments.all):
        verdict = verify(folder, arguments.threads, lambda line: print(line, file=sys.stderr, flush=True))
        verdicts.append(verdict)
        if not arguments.json:
            print(f"{folder}: {'whole' if verdict.whole else 'DAMAGED'}")
            print("".join(f"  {fault}\n" for fault in verdict.faults), end="")
            if verdict.without_checksum:
                print(f"  of {len(verdict.without_checksum)} files only the size was recorded")
    if arguments.json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts]))
    return 0 if all(verdict.whole for verdict in verdicts) else DIFFERENT_EXIT_CODE
