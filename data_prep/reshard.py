"""`megatron-video data reshard`: write shards of another size, with --seed in another order.

A shard holds samples of one bucket, so they are shuffled within each bucket. Every sample's checksum is compared, and a
stopped run goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.rearrange import add_shard_options, print_rearranged, rearrange_parser, reshard
from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    parser = rearrange_parser("reshard", __doc__)
    add_shard_options(parser, seed="shuffle (default: the order stays)")
    arguments = parser.parse_args(argv)
    report = reshard(arguments.source, arguments.out, arguments.samples_per_shard, arguments.seed)
    print_rearranged(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
