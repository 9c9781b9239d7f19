"""`megatron-video watch RUN ...`: how runs stand, on a terminal that is kept up to date; `--once` prints it once.

It reads the end of the run's records only, so a run of months is watched as easily as one of minutes, from any machine
that sees its folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from megatron_video.cli import run_command
from training.run_tail import RunTail
from training.watch_panel import run_panel


def main(argv: Sequence[str]) -> int:
    """Show the runs until Ctrl-C, or once."""
    arguments = _parse(argv)
    tails = [RunTail(folder) for folder in arguments.runs]
    # A pipe has no width; lines of 100 columns fit most places where they end up.
    console = Console(width=None if sys.stdout.isatty() else 100)
    if arguments.once:
        console.print(_panels(tails))
        return 0
    try:
        with Live(console=console, auto_refresh=False, screen=sys.stdout.isatty()) as live:
            while True:
                live.update(_panels(tails), refresh=True)
                time.sleep(arguments.every)
    except KeyboardInterrupt:
        # The way to end it; what was seen last stays on the terminal.
        console.print(_panels(tails))
    return 0


def _panels(tails: Sequence[RunTail]) -> Group:
    for tail in tails:
        tail.read()
    return Group(*(run_panel(tail) for tail in tails))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video watch", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder named by run.output_dir")
    parser.add_argument("--once", action="store_true", help="print the state and end")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between readings (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
