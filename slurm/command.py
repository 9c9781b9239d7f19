"""`megatron-video slurm COMMAND`: a table of commands, each a module with `main(argv) -> int | None`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_video.errors import UserError

# command -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "submit": ("slurm.submit", "check a job, freeze its code and configuration, hand it to SLURM"),
    "status": ("slurm.status", "how jobs stand: queue, progress, checkpoints, verdicts"),
    "logs": ("slurm.logs", "what the ranks of a job said, by start, node or rank; the first error"),
    "cancel": ("slurm.cancel", "let a job save and leave, and start nothing after it"),
    "resume": ("slurm.resume", "submit a run again, as its newest job was"),
    "evaluations": ("slurm.evaluations", "what `submit evaluate` measured of every checkpoint, in one table"),
    "preflight": ("slurm.preflight_command", "check nodes by hand, as every job does before its start"),
    "nodes": ("slurm.nodes", "what preflight measured of every node over time, the worst first"),
}


def main(argv: Sequence[str]) -> int | None:
    """Call the command that the first word names.

    Raises:
        UserError: there is none of this name.
    """
    return call_from_table("megatron-video slurm", COMMANDS, argv)


def call_from_table(program: str, table: dict[str, tuple[str, str]], argv: Sequence[str]) -> int | None:
    """Call `main(rest)` of the module that the first word names; without one, or with --help, print the table.

    Raises:
        UserError: the word is not in the table.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(program, table), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in table:
        raise UserError(f"{program}: unknown {argv[0]!r}; there are: {', '.join(table)}")
    code: int | None = importlib.import_module(table[argv[0]][0]).main(argv[1:])
    return code


def _usage(program: str, table: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, table), default=0)
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in table.items()]
    return "\n".join([f"usage: {program} WHAT ...", "", *lines, "", f"{program} WHAT --help tells more."])
