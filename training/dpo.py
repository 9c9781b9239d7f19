"""`megatron-video dpo train`, or for several ranks `torchrun ... -m training.dpo`: align the DiT with preferences.

Training on shards of preference pairs from a finished pretraining run or checkpoint (run.initial_weights), which is
also the reference. Everything else is as in `megatron-video pretrain`: layouts, checkpoints, resume, exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_video.cli import run_command
from training.pretrain import run_command_line

PRESET_DIR = Path(__file__).parent / "configs" / "dpo"


def main(argv: Sequence[str]) -> int:
    """Read the configuration, refuse what cannot work, train."""
    return run_command_line(argv, "megatron-video dpo train", __doc__ or "", PRESET_DIR, needs_preferences=True)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
