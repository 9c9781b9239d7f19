"""The forms in which weights are stored, and how each is recognised."""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.released import CONFIG_FILE, ReleasedFolder
from checkpoints_tools.weights import Weights


def open_weights(path: Path) -> Weights:
    """A released folder (it has config.json) or a megatron-core checkpoint.

    Raises:
        UserError: neither.
    """
    return ReleasedFolder(path) if (path / CONFIG_FILE).is_file() else CoreCheckpoint(path)
