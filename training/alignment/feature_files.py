"""Features of generated latents on disk: what they are of, which are there, and reading some of them.

    FOLDER/features.json                       identity and number of latents
    FOLDER/latents-00000000-00000064.safetensors
        features [n, times, layers, statistics, D] fp32, llm [n, d_llm], clip [n, d_clip] fp32 (means over tokens)

A latent is known by its number: that of the sample, or 2p for the winner of pair p and 2p + 1 for its loser.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.files import write_atomically

FOLDER, IDENTITY_FILE = "features", "features.json"
STATISTICS = ("mean over tokens", "standard deviation over tokens", "RMS change from frame to frame")
# A killed pass computes at most one block of every replica again.
BLOCK = 64
_OPEN_BLOCKS = 64


@dataclass(frozen=True)
class FeatureSettings:
    """What features are of, beside the latents: a reward model is right for features of equal settings only."""

    checkpoint: str
    """Name and hash of the weights, as `Reference.fingerprint` gives it."""
    layers: tuple[int, ...]
    """Layers, counted from 0, after which hidden states are taken."""
    times: tuple[float, ...]
    """Times in [0, 1) that the latents are noised to; 0 is noise."""
    seed: int
    precision: str
    statistics: tuple[str, ...] = STATISTICS

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """From JSON, in which there are no tuples."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**fields)

    def differences(self, other: FeatureSettings) -> str:
        """What is not equal, by name, with both values; empty if all is."""
        ours, theirs = asdict(self), asdict(other)
        names = [name for name in ours if ours[name] != theirs[name]]
        return "; ".join(f"{name}: {json.dumps(ours[name])} and {json.dumps(theirs[name])}" for name in names)

    def folder_in(self, data: Path) -> Path:
        """Where the features of a folder of pairs or samples are unless told otherwise: beside its own files."""
        digest = hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=4).hexdigest()
        return data / FOLDER / digest


class Features(NamedTuple):
    """Of n latents, with the means of their text states."""

    features: Tensor
    """[n, times, layers, statistics, D]"""
    llm: Tensor
    """[n, d_llm]"""
    clip: Tensor
    """[n, d_clip]"""


class FeatureFiles:
    """A folder of features.

    Args:
        folder: the folder.
        settings: of the features.
        data: fingerprint of the folder of pairs or samples that they are of.
        count: number of latents there.
        model: where the checkpoint lay; told to people, never compared.
    """

    def __init__(self, folder: Path, settings: FeatureSettings, data: str, count: int, model: str) -> None:
        self.folder, self.settings, self.data, self.count, self.model = folder, settings, data, count, model
        # Mapped, not read: rows are asked for in any order.
        self._opened = lru_cache(_OPEN_BLOCKS)(partial(safe_open, framework="pt"))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """What is in a folder.

        Raises:
            UserError: no features there.
        """
        path = folder / IDENTITY_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            settings = FeatureSettings.from_values(values["settings"])
            return cls(folder, settings, values["data"], values["latents"], values["model"])
        except OSError:
            raise UserError(f"{folder}: no {IDENTITY_FILE} there; `megatron-video dpo features` writes it") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged: {error}; delete {folder} and compute the features again") from None

    def claim(self) -> None:
        """Create the folder for these features, on one rank.

        Raises:
            UserError: it holds others; names what differs.
        """
        path = self.folder / IDENTITY_FILE
        if path.exists():
            self.check(FeatureFiles.open(self.folder))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"settings": asdict(self.settings), "data": self.data, "latents": self.count, "model": self.model}
        write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())

    def check(self, there: FeatureFiles) -> None:
        """Refuse features that are not these.

        Raises:
            UserError: names what differs.
        """
        different = there.settings.differences(self.settings)
        if there.data != self.data:
            different += f"{'; ' if different else ''}data: {there.data} and {self.data}"
        if different:
            raise UserError(
                f"{there.folder} holds other features (there and wanted: {different}); give another folder, or delete "
                "this one"
            )

    def missing(self) -> list[int]:
        """First latents of the blocks that are not there."""
        return [first for first in range(0, self.count, BLOCK) if not self._path(first).is_file()]

    def write(self, first: int, found: Features) -> None:
        """Store the block that begins with latent `first`; the file appears whole."""
        tensors = {name: tensor.contiguous() for name, tensor in found._asdict().items()}
        write_atomically(self._path(first), save(tensors))

    def read(self, numbers: Sequence[int]) -> Features:
        """Features of these latents; nothing else of their files is read.

        Raises:
            UserError: a block is missing or damaged.
        """
        rows = [self._row(number) for number in numbers]
        return Features(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def end(self, first: int) -> int:
        """End of the block that begins with latent `first`."""
        return min(first + BLOCK, self.count)

    def _path(self, first: int) -> Path:
        return self.folder / f"latents-{first:08d}-{self.end(first):08d}.safetensors"

    def _row(self, number: int) -> list[Tensor]:
        path = self._path(number // BLOCK * BLOCK)
        try:
            opened = self._opened(path)
            return [opened.get_slice(name)[number % BLOCK] for name in Features._fields]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); delete it and give the command that made it again"
            ) from None
