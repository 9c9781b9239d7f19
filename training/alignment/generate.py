"""`megatron-video dpo generate`, or `torchrun ... -m training.alignment.generate`: prompts x seeds, latents kept.

`megatron-video sample` with --latents: all its options, its resume, its sharing of prompts over replicas.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_video.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Generate what is missing."""
    from training import sample

    return sample.main([*argv, "--latents"])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
