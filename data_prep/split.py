"""`megatron-video data split`: deal samples out over several folders, such as train and test (see rearrange.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep import rearrange
from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    return rearrange.main(argv, "split")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
