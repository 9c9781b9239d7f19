"""Prompts to sample from, and which noise belongs to each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.flops import LatentShape
from megatron_video.noise import NoiseSource

_NOISE_STAGE = "sample"
_OWN_FIELDS = ("prompt", "seed")


@dataclass(frozen=True)
class Prompt:
    """One video to make."""

    index: int
    """Place in the prompt file."""
    text: str
    seed: int
    noise_index: int
    """With `seed`, the key of the initial noise: the place in the file, or 0 where the file gives the seed."""
    tags: dict[str, Any] = field(default_factory=dict)
    """What else the line said; passed on to samples.jsonl."""

    def noise(self, shape: LatentShape, channels: int) -> Tensor:
        """Initial noise [1, T, channels, h, w], fp32: of this prompt alone, whatever batch or rank it is sampled in."""
        size = (1, shape.frames, channels, shape.height, shape.width)
        return NoiseSource(self.seed, _NOISE_STAGE).noise(0, self.noise_index, size)


def read_prompts(path: Path, seed: int, limit: int | None = None) -> list[Prompt]:
    """Prompts of a text file (one a line) or of a .jsonl file ({"prompt": ..., "seed": ...}, seed optional).

    A seed in the file decides the noise alone, so such a line makes the same video in any file.

    Raises:
        UserError: the file cannot be read, holds no prompt, or a line of it is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} is not readable as a text file: {error}") from None
    # Line numbers for errors, before empty lines go.
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {path} holds no prompt")
    if path.suffix != ".jsonl":
        return [Prompt(i, line, seed, i) for i, (_, line) in enumerate(numbered[:limit])]
    return [_parse(i, line, seed, f"{path}, line {number}") for i, (number, line) in enumerate(numbered[:limit])]


def with_seeds(prompts: list[Prompt], seeds: int) -> list[Prompt]:
    """Every prompt with its seed and the `seeds` - 1 that follow it; videos of one prompt are next to each other."""
    repeated = [replace(prompt, seed=prompt.seed + number) for prompt in prompts for number in range(seeds)]
    return [replace(prompt, index=index) for index, prompt in enumerate(repeated)]


def _parse(index: int, line: str, seed: int, where: str) -> Prompt:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{where}: expected {{"prompt": "...", "seed": ...}}, found {line[:80]}')
    own_seed = values.get("seed")
    # true is an int to Python, and a mistake here.
    if own_seed is not None and (isinstance(own_seed, bool) or not isinstance(own_seed, int)):
        raise UserError(f"{where}: seed={own_seed!r} must be a whole number")
    tags = {key: value for key, value in values.items() if key not in _OWN_FIELDS}
    if own_seed is None:
        return Prompt(index, values["prompt"], seed, index, tags)
    return Prompt(index, values["prompt"], own_seed, 0, tags)
