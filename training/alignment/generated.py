"""Folders of generated samples, as the steps after generation read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_video.errors import UserError

SETTINGS_FILE, LISTING_FILE = "settings.json", "samples.jsonl"
# Of samples without a category, in a folder where others have one.
NO_CATEGORY = "(none)"

# Settings in which two folders that are compared may differ.
_FREE = {"checkpoint", "ema", "latents", "precision"}


@dataclass(frozen=True)
class Sample:
    """One generated video."""

    index: int
    """Its number in the folder."""
    prompt: str
    seed: int
    file: Path
    """mp4, or PNG of an image."""
    category: str | None = None
    """What the prompt is about, where the list of prompts says so."""

    @property
    def noise_key(self) -> tuple[str, int]:
        """Equal for the videos that several models made of one initial noise."""
        return self.prompt, self.seed

    @property
    def latent_file(self) -> Path:
        """Where its latent is, if it was kept."""
        # Here: who only looks at videos does without torch.
        from training.sample_latents import latent_file

        return latent_file(self.file.parent, self.index)


@dataclass(frozen=True)
class Generated:
    """All samples of a folder, and what they were made with."""

    folder: Path
    settings: dict[str, Any]
    samples: list[Sample]

    def by_prompt(self) -> dict[str, list[Sample]]:
        """The samples of every prompt, prompts in their first order."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.prompt, []).append(sample)
        return groups

    def by_category(self) -> dict[str, list[Sample]]:
        """The samples of every category, categories in their first order; {} where no sample has one."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.category or NO_CATEGORY, []).append(sample)
        return {} if groups.keys() <= {NO_CATEGORY} else groups


def read_generated(folder: Path) -> Generated:
    """Read a folder that `megatron-video dpo generate` (or `sample`) finished.

    Raises:
        UserError: it is no such folder, unfinished, or a video is missing.
    """
    settings_path, listing = folder / SETTINGS_FILE, folder / LISTING_FILE
    if not settings_path.is_file() or not listing.is_file():
        raise UserError(
            f"--samples {folder}: no {SETTINGS_FILE} and {LISTING_FILE} there; `megatron-video dpo generate`"
        )
    record = json.loads(settings_path.read_text(encoding="utf-8"))
    samples = [_sample(folder, line) for line in listing.read_text(encoding="utf-8").split("\n") if line]
    missing = len(record["prompts"]) - len(samples)
    if missing:
        raise UserError(
            f"--samples {folder}: {missing} of {len(record['prompts'])} samples are missing; generate again"
        )
    gone = [str(sample.file) for sample in samples if not sample.file.is_file()]
    if gone:
        raise UserError(f"--samples {folder}: {len(gone)} videos are not there, first: {gone[0]}; generate again")
    return Generated(folder, record["settings"], samples)


def check_alike(old: Generated, new: Generated) -> None:
    """Whether two folders were sampled alike, but for the weights.

    Raises:
        UserError: other prompts, seeds or settings.
    """
    names = sorted({*old.settings, *new.settings} - _FREE)
    different = [name for name in names if old.settings.get(name) != new.settings.get(name)]
    if different:
        lines = "; ".join(f"{name}: {old.settings.get(name)} and {new.settings.get(name)}" for name in different)
        raise UserError(f"{old.folder} and {new.folder} were sampled otherwise ({lines}); only weights may differ")
    theirs, ours = ({sample.noise_key for sample in side.samples} for side in (old, new))
    if theirs != ours:
        raise UserError(
            f"{old.folder} and {new.folder} hold other prompts or seeds ({len(theirs - ours)} and "
            f"{len(ours - theirs)} of them are in one alone); sample both from one prompt file"
        )


def _sample(folder: Path, line: str) -> Sample:
    values = json.loads(line)
    category = values.get("category")
    # Older lists may hold anything there.
    known = category if isinstance(category, str) else None
    return Sample(values["index"], values["prompt"], values["seed"], folder / values["file"], known)
