"""Prompts to sample from, and which noise belongs to each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.flops import LatentShape
from megatron_video.noise import NoiseSource
from training.prompt_files import OWN_FIELDS, Row, read_rows

_NOISE_STAGE = "sample"
CATEGORY = "category"
# Characters of a prompt in a message.
_SHOWN = 60

STEP_VIDEO_T2V_EVAL = "step-video-t2v-eval"
# list -> categories with their numbers of prompts, in order. The released list of Step-Video-T2V-Eval has lines
# alone; the sums of Table 7 (arXiv 2502.10248) say which are of which category.
PROMPT_LISTS: dict[str, dict[str, int]] = {
    STEP_VIDEO_T2V_EVAL: {
        "Sports": 12,
        "Food": 11,
        "Scenery": 12,
        "Animals": 12,
        "Festivals": 11,
        "Combined Concepts": 12,
        "Surreal": 11,
        "People": 12,
        "3D Animation": 12,
        "Cinematography": 11,
        "Style": 12,
    },
}


@dataclass(frozen=True)
class Prompt:
    """One video to make."""

    index: int
    """Place in the prompt file."""
    text: str
    seed: int
    noise_index: int
    """With `seed`, the key of the initial noise: the place in the file, or 0 where the file gives the seed alone."""
    tags: dict[str, Any] = field(default_factory=dict)
    """What else the line said, such as a category; passed on to samples.jsonl."""

    def noise(self, shape: LatentShape, channels: int) -> Tensor:
        """Initial noise [1, T, channels, h, w], fp32: of this prompt alone, whatever batch or rank it is sampled in."""
        size = (1, shape.frames, channels, shape.height, shape.width)
        return NoiseSource(self.seed, _NOISE_STAGE).noise(0, self.noise_index, size)


def read_prompts(
    path: Path, seed: int, limit: int | None = None, categories: Mapping[str, int] | None = None
) -> list[Prompt]:
    """Prompts of a file: one a line (.txt), JSON lines (.jsonl), or a table with a header (.csv, .tsv).

    The fields of a line are `prompt`, `seed` and `category`, the last two optional; further ones are kept as tags. A
    seed in the file decides the noise alone, so such a line makes the same video in any file.

    Args:
        path: the file.
        seed: of prompts that bring none.
        limit: only the first so many.
        categories: numbers of prompts by category, in the order of the file, which names none itself.

    Raises:
        UserError: the file cannot be read, holds no prompt, a line of it is wrong, two lines make the same sample, or
            the categories are not those of the file.
    """
    rows = read_rows(path)
    if categories is not None:
        rows = _with_categories(rows, categories, path)
    prompts = [_prompt(index, row, seed) for index, row in enumerate(rows)]
    twice = _first_twice(prompts)
    if twice is not None:
        before, again = twice
        raise UserError(
            f"{rows[again].where}: {prompts[again].text[:_SHOWN]!r} with seed {prompts[again].seed} is there already "
            f"({rows[before].where}); leave it out, or give it another seed (several videos of every prompt: --seeds)"
        )
    return prompts[:limit]


def with_seeds(prompts: list[Prompt], seeds: int) -> list[Prompt]:
    """Every prompt with its seed and the `seeds` - 1 that follow it; videos of one prompt are next to each other.

    Raises:
        UserError: the file gives a prompt seeds that are nearer to each other than that.
    """
    repeated = [replace(prompt, seed=prompt.seed + number) for prompt in prompts for number in range(seeds)]
    twice = _first_twice(repeated)
    if twice is not None:
        prompt = repeated[twice[1]]
        raise UserError(
            f"--seeds {seeds}: {prompt.text[:_SHOWN]!r} would have seed {prompt.seed} twice, as the file gives it "
            f"seeds that are less than {seeds} apart; leave --seeds out, or space them"
        )
    return [replace(prompt, index=index) for index, prompt in enumerate(repeated)]


def parse_categories(text: str) -> dict[str, int]:
    """Numbers of prompts by category from `NAME=COUNT,NAME=COUNT...` or the name of a known list.

    Raises:
        UserError: neither of both.
    """
    if text in PROMPT_LISTS:
        return PROMPT_LISTS[text]
    found: dict[str, int] = {}
    for item in text.split(","):
        name, _, count = item.strip().rpartition("=")
        if not name.strip() or name.strip() in found or not re.fullmatch("[1-9][0-9]*", count):
            raise UserError(
                f"--categories {text}: {item.strip()!r} is not NAME=COUNT with a name of its own and a count above 0; "
                f"known lists: {', '.join(PROMPT_LISTS)}"
            )
        found[name.strip()] = int(count)
    return found


def _with_categories(rows: Sequence[Row], categories: Mapping[str, int], path: Path) -> list[Row]:
    own = next((row.where for row in rows if CATEGORY in row.values), None)
    if own is not None:
        raise UserError(f"--categories, and {own} brings a category of its own; leave one of them out")
    if sum(categories.values()) != len(rows):
        raise UserError(
            f"--categories count {sum(categories.values())} prompts ({len(categories)} categories), "
            f"--prompts {path} holds {len(rows)}"
        )
    names = [name for name, count in categories.items() for _ in range(count)]
    return [row._replace(values=row.values | {CATEGORY: name}) for row, name in zip(rows, names, strict=True)]


def _prompt(index: int, row: Row, seed: int) -> Prompt:
    text = str(row.values.get("prompt", ""))
    if not text.strip():
        raise UserError(f"{row.where}: the prompt is empty")
    category = row.values.get(CATEGORY)
    if category is not None and (not isinstance(category, str) or not category.strip()):
        raise UserError(f"{row.where}: category={category!r} must be a text that is not empty, or left out")
    tags = {name: value for name, value in row.values.items() if name not in OWN_FIELDS}
    tags |= {} if category is None else {CATEGORY: category.strip()}
    own_seed = _whole_number(row, "seed")
    if own_seed is None:
        return Prompt(index, text, seed, index, tags)
    return Prompt(index, text, own_seed, _whole_number(row, "noise_index") or 0, tags)


def _whole_number(row: Row, name: str) -> int | None:
    value = row.values.get(name)
    if isinstance(value, str) and re.fullmatch("-?[0-9]+", value):
        return int(value)
    # true is an int to Python, and a mistake here.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{row.where}: {name}={value!r} must be a whole number")
    return value


def _first_twice(prompts: Sequence[Prompt]) -> tuple[int, int] | None:
    """Places of two that what follows could not tell apart, as it knows samples by prompt and seed."""
    first: dict[tuple[str, int], int] = {}
    for place, prompt in enumerate(prompts):
        before = first.setdefault((prompt.text, prompt.seed), place)
        if before != place:
            return before, place
    return None
