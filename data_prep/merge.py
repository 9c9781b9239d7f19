"""`megatron-video data merge`: join folders of shards that were made with the same encoders (see rearrange.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep import rearrange
from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    return rearrange.main(argv, "merge")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
