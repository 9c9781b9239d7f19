"""A small run and pairs for it, for tests of features of the DiT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny_models import MODEL, write_tiny_run
from tiny_pairs import write_tiny_pairs
from tiny_shards import CLIP_DIM, LLM_DIM

COUNTS = {"17x48x48": 20, "17x48x64": 14}
"""68 latents: more than one block."""


def tiny_run(folder: Path, seed: int = 0) -> Path:
    """A run whose model takes the latents and text states of `tiny_pairs`."""
    return write_tiny_run(folder, seed=seed, dit=replace(MODEL, caption_channels=[LLM_DIM, CLIP_DIM]))


def tiny_pairs(folder: Path, name: str = "pairs", seed: int = 0) -> Path:
    """`folder`/`name` with 34 pairs in two buckets, whose winners are larger."""
    return write_tiny_pairs(folder / name, COUNTS, seed=seed, offset=0.5)
