"""`megatron-video data split`: deal samples out over several folders, such as train and test.

By a hash of the file that a clip was cut from, so that all clips of one video lie in one folder, whatever other videos
there are; so the shares are only about kept. Every sample's checksum is compared, and a stopped run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.rearrange import add_shard_options, parse_shares, print_rearranged, rearrange_parser, split
from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    parser = rearrange_parser("split", __doc__)
    parser.checks = [lambda arguments: parse_shares(arguments.parts)]
    add_shard_options(parser, seed="another draw (default 0)")
    parts = "folders under --out, such as train=98,test=2"
    parser.add_argument("--parts", required=True, metavar="NAME=SHARE,...", help=parts)
    arguments = parser.parse_args(argv)
    shares, seed = parse_shares(arguments.parts), arguments.seed or 0
    report = split(arguments.source, arguments.out, shares, arguments.samples_per_shard, seed)
    print_rearranged(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
