"""`megatron-video dpo generate`, or `torchrun ... -m training.alignment.generate`: prompts x seeds -> videos, latents.

`megatron-video sample` with its options, its resume, its layouts and its sharing of prompts over replicas; latents are
kept. All of them are sampled first; then the model makes room, and every rank decodes. A run that is interrupted
between the two samples nothing again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Generate what is missing."""
    from training.sample import run
    from training.sample_options import parse_arguments

    return run(parse_arguments(argv, "megatron-video dpo generate", str(__doc__), keeps_latents=True))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
