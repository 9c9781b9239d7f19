"""`megatron-video data merge`: join folders of shards that were made with the same encoders.

The tars are the old ones under new names, byte for byte: hard links where the file system has them, else copies. The
checksum of each is compared; a stopped run goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.rearrange import merge, print_rearranged, rearrange_parser
from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    parser = rearrange_parser("merge", __doc__)
    help_line = "folders of shards, two or more"
    parser.add_argument("--in", dest="sources", type=Path, nargs="+", required=True, metavar="SHARDS", help=help_line)
    parser.add_argument("--copy", action="store_true", help="copy tars instead of linking them")
    arguments = parser.parse_args(argv)
    print_rearranged(merge(arguments.sources, arguments.out, link=not arguments.copy), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
