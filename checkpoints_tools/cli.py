"""`megatron-video ckpt`: convert, average, compare and check checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from checkpoints_tools import (
    average,
    convert,
    diff_command,
    inspect_command,
    pipeline,
    prune,
    reshard,
    upcycle,
    verify_command,
)


def main(argv: Sequence[str]) -> int:
    """Run `megatron-video ckpt ...`."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-video ckpt", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert.add_command(commands)
    pipeline.add_command(commands)
    verify_command.add_command(commands)
    average.add_command(commands)
    upcycle.add_command(commands)
    diff_command.add_command(commands)
    inspect_command.add_command(commands)
    reshard.add_command(commands)
    prune.add_command(commands)
    return parser
